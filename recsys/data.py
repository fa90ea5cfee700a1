"""Shards of a dataset folder -> this rank's batches.

There is one global order of rows an epoch: row groups shuffled, then cut into windows whose rows are shuffled. Step
k takes the next `ranks x batch_size` rows and each rank its slice of them, so any number of ranks sees the same steps,
and a position (rows taken by all ranks) is all that a checkpoint has to keep.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from etl.artifact import read_json
from etl.faults import Fault
from etl.schema import GROUP, IdFeature, Schema, read_schema
from recsys.ahead import ahead

_WINDOW_GROUPS = 16
_REMEDY = "run 'python -m etl run' again"


@dataclass(frozen=True)
class RowGroup:
    """The unit of reading."""

    file: Path
    index: int
    rows: int
    first: int
    """The number of its first row, counted in file order over all files of the split."""


class Rows(NamedTuple):
    """Rows in memory: ids int64 [R, S], floats float32 [R, N], labels float32 [R, T], groups int64 [R, 1 or 0].

    `numbers_R` int64 counts the rows of the split in file order.
    """

    ids_RS: npt.NDArray[np.int64]
    floats_RN: npt.NDArray[np.float32]
    labels_RT: npt.NDArray[np.float32]
    groups_RG: npt.NDArray[np.int64]
    numbers_R: npt.NDArray[np.int64]

    def take(self, which: slice | npt.NDArray[np.int64]) -> "Rows":
        """Some of the rows."""
        return Rows._make(part[which] for part in self)


@dataclass(frozen=True)
class Batch:
    """This rank's rows of one step: ids and groups int64, the rest float32.

    `weights_BT` is 1 where a row counts for a task and 0 where it does not: on rows that fill up the last step (copies
    of its real rows, so that batch statistics stay sound) and where the task's condition does not hold. `global_rows`
    counts the real rows of the step over all ranks. `numbers_B` says which rows of the split these are; it stays on the
    CPU and is None where the rows come from no split.
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
        """The same rows on a device, copied without waiting."""
        ids_BS, groups_BG = (t.to(device, non_blocking=True) for t in (self.ids_BS, self.groups_BG))
        floats = (self.floats_BN, self.labels_BT, self.real_B, self.weights_BT)
        floats_BN, labels_BT, real_B, weights_BT = (t.to(device, non_blocking=True) for t in floats)
        return Batch(ids_BS, floats_BN, labels_BT, groups_BG, real_B, weights_BT, self.global_rows, self.numbers_B)

    def parts(self, count: int) -> list["Batch"]:
        """The same rows as so many batches, each of the same `global_rows`."""
        size = -(-len(self.ids_BS) // count)
        return [self._rows(slice(at, at + size)) for at in range(0, len(self.ids_BS), size)]

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


def open_dataset(folder: Path, data_hash: str) -> Schema:
    """The schema of a dataset folder.

    Raises:
        Fault: the folder is missing, unfinished, or made from other ETL sections than the experiment's.
    """
    path = folder / "manifest.json"
    found = read_json(path, remedy=_REMEDY)["hash"]
    if found != data_hash:
        got, wanted = f"data of another feature spec ({found[:12]})", f"that of this experiment ({data_hash[:12]})"
        raise Fault(str(path), got=got, wanted=wanted, remedy=_REMEDY)
    return read_schema(folder)


class Split:
    """The rows of one split."""

    def __init__(self, folder: Path, schema: Schema) -> None:
        self._schema = schema
        self.groups = _row_groups(folder)
        self.rows = sum(group.rows for group in self.groups)

    def in_file_order(self, mine: Slice) -> Iterator[Batch]:
        """All rows once, for evaluation."""
        return ahead(self._steps([[group] for group in self.groups], mine, start=0, order=None))

    def shuffled(self, mine: Slice, *, seed: int, epoch: int, start: int) -> Iterator[Batch]:
        """The rest of an epoch from the global row `start`; the order depends on seed and epoch alone."""
        order = np.random.default_rng([seed, epoch])
        groups = [self.groups[at] for at in order.permutation(len(self.groups))]
        windows = [groups[at : at + _WINDOW_GROUPS] for at in range(0, len(groups), _WINDOW_GROUPS)]
        return ahead(self._steps(windows, mine, start=start, order=order))

    def _steps(
        self, windows: Sequence[Sequence[RowGroup]], mine: Slice, *, start: int, order: np.random.Generator | None
    ) -> Iterator[Batch]:
        kept: list[Rows] = []
        for rows in self._windows(windows, start=start, order=order):
            kept.append(rows)
            held = sum(len(part.ids_RS) for part in kept)
            if held < mine.step_rows:
                continue
            joined = _join(kept)
            whole = held - held % mine.step_rows
            for at in range(0, whole, mine.step_rows):
                yield self._batch(joined.take(slice(at, at + mine.step_rows)), mine)
            kept = [joined.take(slice(whole, held))]
        if sum(len(part.ids_RS) for part in kept):
            yield self._batch(_join(kept), mine)

    def _windows(
        self, windows: Sequence[Sequence[RowGroup]], *, start: int, order: np.random.Generator | None
    ) -> Iterator[Rows]:
        """Each window's rows in their order; what lies before `start` is skipped, whole windows without reading."""
        end = 0
        for window in windows:
            size = sum(group.rows for group in window)
            which = np.arange(size) if order is None else order.permutation(size)
            begin, end = end, end + size
            if end > start:
                rows = _join([self._read(group) for group in window])
                yield rows.take(which[max(0, start - begin) :])

    def _read(self, group: RowGroup) -> Rows:
        schema, file = self._schema, pq.ParquetFile(group.file)
        values = [f"{feature.name}:value" for feature in schema.features if feature.weighted]
        groups = [GROUP] if schema.group else []
        names = [*schema.id_names, *schema.dense_names, *values, *schema.task_names, *groups]
        if absent := sorted(set(names) - set(file.schema_arrow.names)):
            raise Fault(str(group.file), got=f"no column {', '.join(absent)}", wanted="the schema's", remedy=_REMEDY)
        table = file.read_row_group(group.index, columns=names, use_threads=False)
        ids = np.full((table.num_rows, schema.slot_ends[-1] if schema.features else 0), -1, np.int64)
        floats = np.zeros((table.num_rows, len(schema.float_names)), np.float32)
        for at, name in enumerate(schema.dense_names):
            floats[:, at] = _column(table, name, place=group.file, dtype=pa.float32())
        at = len(schema.dense)
        for feature, end in zip(schema.features, schema.slot_ends, strict=True):
            into = ids[:, end - feature.slots : end]
            _fill(into, table, name=feature.name, place=group.file, dtype=pa.int64())
            _check_ids(into, feature, rows=schema.rows(feature.table), place=f"{group.file}: column '{feature.name}'")
            if feature.weighted:
                into_values = floats[:, at : at + feature.slots]
                _fill(into_values, table, name=f"{feature.name}:value", place=group.file, dtype=pa.float32())
                at += feature.slots
        labels = np.empty((table.num_rows, len(schema.tasks)), np.float32)
        for at, name in enumerate(schema.task_names):
            labels[:, at] = _column(table, name, place=group.file, dtype=pa.float32())
        self._check_finite(floats, schema.float_names, first=group.first)
        self._check_finite(labels, schema.task_names, first=group.first)
        of_group = [_column(table, name, place=group.file, dtype=pa.int64())[:, None] for name in groups]
        groups_RG = np.concatenate([np.zeros((len(ids), 0), np.int64), *of_group], axis=1)
        return Rows(ids, floats, labels, groups_RG, np.arange(group.first, group.first + group.rows))

    def _batch(self, rows: Rows, mine: Slice) -> Batch:
        """This rank's slice of one step, filled up to full size with copies of the step's rows."""
        count = len(rows.ids_RS)
        place = np.arange(mine.rank * mine.batch_size, (mine.rank + 1) * mine.batch_size)
        own = rows if mine.step_rows == count and mine.ranks == 1 else rows.take(place % count)
        ids, floats, labels, groups, numbers = (torch.from_numpy(part) for part in own)
        real = torch.from_numpy((place < count).astype(np.float32))
        weights = real[:, None].repeat(1, len(self._schema.tasks))
        for at, task in enumerate(self._schema.tasks):
            if task.given is not None:
                weights[:, at] *= labels[:, self._schema.task_names.index(task.given)]
        return Batch(ids, floats, labels, groups, real, weights, count, numbers)

    def _check_finite(self, values: npt.NDArray[np.float32], names: Sequence[str], *, first: int) -> None:
        if not np.isfinite(values).all():
            row, at = np.argwhere(~np.isfinite(values))[0]
            got = f"{values[row, at]} in column '{names[at]}'"
            raise Fault(self.place(first + int(row)), got=got, wanted="a finite number", remedy=_REMEDY)

    def place(self, number: int) -> str:
        """The file and the row in it, counted from 0, of a row of the split."""
        group = self.groups[bisect_right(self.groups, number, key=lambda group: group.first) - 1]
        before = sum(other.rows for other in self.groups if other.file == group.file and other.index < group.index)
        return f"{group.file}, row {number - group.first + before}"


def _row_groups(folder: Path) -> list[RowGroup]:
    found, first = [], 0
    for path in sorted(folder.glob("*.parquet")):
        try:
            metadata = pq.read_metadata(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise Fault(str(path), got=str(error), wanted="a whole parquet file", remedy=_REMEDY) from None
        for at in range(metadata.num_row_groups):
            if size := metadata.row_group(at).num_rows:
                found.append(RowGroup(path, at, size, first))
                first += size
    if not found:
        raise Fault(str(folder), got="no rows", wanted="parquet shards with at least one row", remedy=_REMEDY)
    return found


def _column(table: pa.Table, name: str, *, place: Path, dtype: pa.DataType) -> npt.NDArray[Any]:
    """One column of single values."""
    column = table[name]
    if column.type != dtype or column.null_count:
        got = f"column '{name}' of {column.type} with {column.null_count} nulls"
        raise Fault(str(place), got=got, wanted=f"{dtype} without nulls", remedy=_REMEDY)
    values: npt.NDArray[Any] = column.to_numpy()
    return values


def _fill(into: npt.NDArray[Any], table: pa.Table, *, name: str, place: Path, dtype: pa.DataType) -> None:
    """A column into [R, slots]: single values, or lists from the left."""
    column = table[name]
    if not pa.types.is_list(column.type):
        into[:, 0] = _column(table, name, place=place, dtype=dtype)
        return
    lists = pa.concat_arrays(column.chunks)
    lengths = np.diff(np.asarray(lists.offsets))
    if column.type.value_type != dtype or column.null_count or lists.flatten().null_count:
        got = f"column '{name}' of {column.type}, or nulls in it"
        raise Fault(str(place), got=got, wanted=f"lists of {dtype} without nulls", remedy=_REMEDY)
    if lengths.max(initial=0) > into.shape[1]:
        got = f"column '{name}' with a list of {lengths.max()}"
        raise Fault(str(place), got=got, wanted=f"at most {into.shape[1]}", remedy=_REMEDY)
    into[np.arange(into.shape[1]) < lengths[:, None]] = lists.flatten().to_numpy()


def _check_ids(ids: npt.NDArray[np.int64], feature: IdFeature, *, rows: int, place: str) -> None:
    lowest = -1 if feature.dtype == "list<int64>" else 0
    if len(ids) and (int(ids.min()) < lowest or int(ids.max()) >= rows):
        bad = int(ids.min()) if int(ids.min()) < lowest else int(ids.max())
        raise Fault(place, got=f"id {bad}", wanted=f"ids from 0 to {rows - 1}", remedy=_REMEDY)


def _join(parts: Sequence[Rows]) -> Rows:
    return parts[0] if len(parts) == 1 else Rows._make(np.concatenate(columns) for columns in zip(*parts, strict=True))
