"""Shards of a dataset folder -> this rank's batches.

There is one global order of rows an epoch: row groups shuffled, then cut into windows whose rows are shuffled. Step
k takes the next `ranks x batch_size` rows, so any number of ranks sees the same steps, and a position (rows taken by
all ranks) is all that a checkpoint has to keep. What a step takes of a window is divided by row group: each rank
decodes its share of a window's row groups, not all of them.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from etl.artifact import read_json
from etl.faults import Fault
from etl.origin import raw_place
from etl.schema import Schema, read_schema
from recsys.ahead import ahead
from recsys.shards import REMEDY, Int64s, RowGroup, Rows, check_ids, fill, row_groups

_WINDOW_GROUPS = 16
WINDOW_BYTES = 64 << 20
"""Row groups in memory at once: as many as these bytes hold, at least one and at most 16."""
_COLUMNS = 4  # read at once


@dataclass(frozen=True)
class Batch:
    """This rank's rows of one step: ids and groups int64, the rest float32.

    `weights_BT` is 1 where a row counts for a task and 0 where it does not: on rows that fill up the last step (copies
    of its real rows, so that batch statistics stay sound) and where the task's condition does not hold. Where the data
    weighs rows, it is a row's weight in place of 1. `global_rows` counts the real rows of the step over all ranks.
    `numbers_B` says which rows of the split these are; it stays on the CPU, and is None for rows of no split.
    """

    ids_BS: torch.Tensor
    floats_BN: torch.Tensor
    labels_BT: torch.Tensor
    groups_BG: torch.Tensor
    real_B: torch.Tensor
    weights_BT: torch.Tensor
    global_rows: int
    numbers_B: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same rows on a device; without waiting where they are `pinned`."""
        if self.ids_BS.device == device:
            return self
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """The same rows in memory that a GPU reads by itself."""
        return self._moved(torch.Tensor.pin_memory)

    def uncounted(self) -> "Batch":
        """The same rows, none of which counts."""
        return replace(self, real_B=torch.zeros_like(self.real_B), weights_BT=torch.zeros_like(self.weights_BT))

    def parts(self, count: int) -> list["Batch"]:
        """The same rows as so many batches, each of the same `global_rows`."""
        size = -(-len(self.ids_BS) // count)
        return [self._rows(slice(at, at + size)) for at in range(0, len(self.ids_BS), size)]

    def _moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        ids_BS, floats_BN, labels_BT = move(self.ids_BS), move(self.floats_BN), move(self.labels_BT)
        groups_BG, real_B, weights_BT = move(self.groups_BG), move(self.real_B), move(self.weights_BT)
        return Batch(ids_BS, floats_BN, labels_BT, groups_BG, real_B, weights_BT, self.global_rows, self.numbers_B)

    def _rows(self, which: slice) -> "Batch":
        floats = (self.floats_BN[which], self.labels_BT[which], self.groups_BG[which])
        numbers_B = None if self.numbers_B is None else self.numbers_B[which]
        of_rows = (self.real_B[which], self.weights_BT[which])
        return Batch(self.ids_BS[which], *floats, *of_rows, self.global_rows, numbers_B)


@dataclass(frozen=True)
class Slice:
    """Which rows of each step are this rank's."""

    rank: int
    ranks: int
    batch_size: int

    @property
    def step_rows(self) -> int:
        """Rows of one step over all ranks."""
        return self.ranks * self.batch_size

    def share(self, low: int, high: int) -> tuple[int, int]:
        """Which of the rows `low` to `high` of a step are this rank's, counted from `low`: as many as each rank has,
        but for one. A whole step gives each rank a whole batch, however it is put together."""
        of_ranks = [(high + rest) // self.ranks - (low + rest) // self.ranks for rest in reversed(range(self.ranks))]
        before = sum(of_ranks[: self.rank])
        return before, before + of_ranks[self.rank]


def open_dataset(folder: Path, data_hash: str) -> Schema:
    """The schema of a dataset folder.

    Raises:
        Fault: the folder is missing, unfinished, or made from other ETL sections than the experiment's.
    """
    path = folder / "manifest.json"
    found = read_json(path, remedy=REMEDY)["hash"]
    if found != data_hash:
        got, wanted = f"data of another feature spec ({found[:12]})", f"that of this experiment ({data_hash[:12]})"
        raise Fault(str(path), got=got, wanted=wanted, remedy=REMEDY)
    return read_schema(folder)


class Split:
    """The rows of one split; batches are `pinned` where they go to a GPU."""

    def __init__(self, folder: Path, schema: Schema, *, pinned: bool = False) -> None:
        self._schema, self._folder, self._pinned = schema, folder, pinned
        self.groups = row_groups(folder)
        self.rows = sum(group.rows for group in self.groups)

    def in_file_order(self, mine: Slice) -> Iterator[Batch]:
        """All rows once, for evaluation: each rank has a stretch of neighbouring rows, all have equally many batches.

        `global_rows` are those of this rank's batch alone.
        """
        return ahead(self._stretch(mine))

    def shuffled(self, mine: Slice, *, seed: int, epoch: int, start: int) -> Iterator[Batch]:
        """The rest of an epoch from the global row `start`; the order depends on seed and epoch alone."""
        order = np.random.default_rng([seed, epoch])
        groups = [self.groups[at] for at in order.permutation(len(self.groups))]
        bytes_each = Rows.bytes_each(self._schema) * max(group.rows for group in groups)
        size = min(max(WINDOW_BYTES // bytes_each, 1), _WINDOW_GROUPS)
        windows = [groups[at : at + size] for at in range(0, len(groups), size)]
        return ahead(self._steps(_Order(windows, start=start, stop=self.rows, random=order), mine))

    def _stretch(self, mine: Slice) -> Iterator[Batch]:
        steps = -(-self.rows // mine.step_rows)
        first = mine.rank * steps * mine.batch_size
        start = min(first, self.rows - 1)  # a rank without rows repeats the last one, which does not count there
        stop = max(start + 1, min(first + steps * mine.batch_size, self.rows))
        order = _Order([[group] for group in self.groups], start=start, stop=stop, random=None)
        made = 0
        for batch in self._steps(order, Slice(0, 1, mine.batch_size)):
            made += 1
            yield batch if first < self.rows else batch.uncounted()
        for _ in range(made, steps):
            yield batch.uncounted()

    def _steps(self, order: "_Order", mine: Slice) -> Iterator[Batch]:
        begun: list[Rows] = []
        real = 0
        for window, which_R, begin in order.windows():
            pieces = list(_pieces(which_R, mine, begin=begin, total=order.stop - order.start))
            for piece, rows in zip(pieces, self._rows_of(window, pieces), strict=True):
                begun += [] if rows is None else [rows]
                real += piece.real
                if piece.last:
                    yield self._batch(_join(begun), mine, real=real, global_rows=piece.step_rows)
                    begun, real = [], 0

    def _rows_of(self, window: Sequence[RowGroup], pieces: Sequence["_Piece"]) -> Iterator[Rows | None]:
        """Each piece's rows, None where there are none; row groups without any of them are not read."""
        sizes_G = np.array([group.rows for group in window])
        ends_G = sizes_G.cumsum()
        reached_G = np.zeros(len(window), np.bool_)
        for piece in pieces:
            reached_G[ends_G.searchsorted(piece.rows, side="right")] = True
        needed = reached_G.nonzero()[0]
        read = self._read([window[at] for at in needed]) if len(needed) else None
        shift_G = np.zeros(len(window), np.int64)
        shift_G[needed] = sizes_G[needed].cumsum() - ends_G[needed]
        for piece in pieces:
            at_R = piece.rows + shift_G[ends_G.searchsorted(piece.rows, side="right")]
            yield None if read is None or not len(at_R) else read.take(at_R)

    def _read(self, groups: Sequence[RowGroup]) -> Rows:
        """The groups' rows side by side; each group is decoded to where its rows stay."""
        read = Rows.empty(self._schema, sum(group.rows for group in groups))
        end = 0
        for group in groups:
            start, end = end, end + group.rows
            self._decode(group, read.part(start, end))
            pa.default_memory_pool().release_unused()  # what Arrow would keep for the next one
        return read

    def _decode(self, group: RowGroup, into: Rows) -> None:
        """Some columns after others: all of a row group at once would take as much memory again."""
        file, targets = pq.ParquetFile(group.file), list(into.targets(self._schema))
        names = [target.name for target in targets]
        if absent := sorted(set(names) - set(file.schema_arrow.names)):
            raise Fault(str(group.file), got=f"no column {', '.join(absent)}", wanted="the schema's", remedy=REMEDY)
        for at in range(0, len(names), _COLUMNS):
            table = file.read_row_group(group.index, columns=names[at : at + _COLUMNS], use_threads=False)
            for target in targets[at : at + _COLUMNS]:
                values = fill(target, table[target.name], place=group.file)
                if feature := target.ids_of:
                    rows, place = self._schema.rows(feature.table), f"{group.file}: column '{feature.name}'"
                    check_ids(values, feature, rows=rows, place=place)
        self._check_finite(into.floats_RN, self._schema.float_names, first=group.first)
        self._check_finite(into.labels_RT, self._schema.task_names, first=group.first)
        into.numbers_R[:] = np.arange(group.first, group.first + group.rows)

    def _batch(self, rows: Rows, mine: Slice, *, real: int, global_rows: int) -> Batch:
        """This rank's rows of one step; copies of them fill it up, of which none counts."""
        place_B = np.arange(mine.batch_size)
        own = rows if len(rows.ids_RS) == mine.batch_size else rows.take(place_B % len(rows.ids_RS))
        ids, floats, labels, groups, row_weights, numbers = (torch.from_numpy(part) for part in own)
        real_B = torch.from_numpy((place_B < real).astype(np.float32))
        of_rows = real_B[:, None] * row_weights if self._schema.weight else real_B[:, None]
        weights = of_rows.repeat(1, len(self._schema.tasks))
        for at, task in enumerate(self._schema.tasks):
            if task.given is not None:
                weights[:, at] *= labels[:, self._schema.task_names.index(task.given)]
        batch = Batch(ids, floats, labels, groups, real_B, weights, global_rows, numbers)
        return batch.pinned() if self._pinned else batch

    def _check_finite(self, values: npt.NDArray[np.float32], names: Sequence[str], *, first: int) -> None:
        if not np.isfinite(values).all():
            row, at = np.argwhere(~np.isfinite(values))[0]
            got = f"{values[row, at]} in column '{names[at]}'"
            raise Fault(self.place(first + int(row)), got=got, wanted="a finite number", remedy=REMEDY)

    def place(self, number: int) -> str:
        """The shard and the row in it, counted from 0, of a row of the split; and the raw row if it is known."""
        group = self.groups[bisect_right(self.groups, number, key=lambda group: group.first) - 1]
        before = sum(other.rows for other in self.groups if other.file == group.file and other.index < group.index)
        raw = raw_place(self._folder.parent, self._folder.name, number=number)
        return f"{group.file}, row {number - group.first + before}" + (f" ({raw})" if raw else "")


@dataclass(frozen=True)
class _Order:
    """Windows of row groups in which rows `start` to `stop` are read, shuffled within each by `random`."""

    groups: Sequence[Sequence[RowGroup]]
    start: int
    stop: int
    random: np.random.Generator | None

    def windows(self) -> Iterator[tuple[Sequence[RowGroup], Int64s, int]]:
        """Each window, which of its rows are read, in their order, and how many were read before."""
        end = 0
        for window in self.groups:
            size = sum(group.rows for group in window)
            which_R = np.arange(size) if self.random is None else self.random.permutation(size)
            begin, end = end, end + size
            if end > self.start and begin < self.stop:
                yield window, which_R[max(0, self.start - begin) : self.stop - begin], max(0, begin - self.start)


class _Piece(NamedTuple):
    """What a window gives to one step: this rank's rows, by their places in the window.

    The first `real` count. `step_rows` are those of the step over all ranks; `last` says that the step ends here.
    """

    rows: Int64s
    real: int
    step_rows: int
    last: bool


def _pieces(which_R: Int64s, mine: Slice, *, begin: int, total: int) -> Iterator[_Piece]:
    """The steps that rows `begin` and on, of `total`, take part in."""
    end = begin + len(which_R)
    for first in range(begin - begin % mine.step_rows, end, mine.step_rows):
        low, high = max(begin, first), min(end, first + mine.step_rows)
        step_rows = min(mine.step_rows, total - first)
        rows_R = np.sort(which_R[low - begin : high - begin])
        start, stop = mine.share(low - first, high - first)
        last = high == first + step_rows
        fewer = last and mine.share(0, step_rows) == (step_rows, step_rows)
        yield _Piece(rows_R[:1] if fewer else rows_R[start:stop], stop - start, step_rows, last)


def _join(parts: Sequence[Rows]) -> Rows:
    return parts[0] if len(parts) == 1 else Rows._make(np.concatenate(columns) for columns in zip(*parts, strict=True))
