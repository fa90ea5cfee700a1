"""Shards of a dataset folder -> this rank's batches.

There is one global order of rows an epoch: row groups shuffled, then cut into windows whose rows are shuffled. Step
k takes the next `ranks x batch_size` rows and each rank its slice of them, so any number of ranks sees the same steps,
and a position (rows taken by all ranks) is all that a checkpoint has to keep.
"""

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from etl.artifact import read_json
from etl.faults import Fault
from etl.schema import Schema, read_schema
from recsys.batch import Batch

T = TypeVar("T")
_WINDOW_GROUPS = 16
_AHEAD = 8
_REMEDY = "run 'python -m etl run' again"


@dataclass(frozen=True)
class RowGroup:
    """The unit of reading."""

    file: Path
    index: int
    rows: int


class Rows(NamedTuple):
    """Rows in memory: ids int64 [R, F], dense float32 [R, N], labels float32 [R, T]."""

    ids_RF: npt.NDArray[np.int64]
    dense_RN: npt.NDArray[np.float32]
    labels_RT: npt.NDArray[np.float32]

    def take(self, which: slice | npt.NDArray[np.int64]) -> "Rows":
        """Some of the rows."""
        return Rows(self.ids_RF[which], self.dense_RN[which], self.labels_RT[which])


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
        self._groups = _row_groups(folder)
        self.rows = sum(group.rows for group in self._groups)

    def in_file_order(self, mine: Slice) -> Iterator[Batch]:
        """All rows once, for evaluation."""
        return _ahead(self._steps([[group] for group in self._groups], mine, start=0, order=None))

    def shuffled(self, mine: Slice, *, seed: int, epoch: int, start: int) -> Iterator[Batch]:
        """The rest of an epoch from the global row `start`; the order depends on seed and epoch alone."""
        order = np.random.default_rng([seed, epoch])
        groups = [self._groups[at] for at in order.permutation(len(self._groups))]
        windows = [groups[at : at + _WINDOW_GROUPS] for at in range(0, len(groups), _WINDOW_GROUPS)]
        return _ahead(self._steps(windows, mine, start=start, order=order))

    def _steps(
        self, windows: Sequence[Sequence[RowGroup]], mine: Slice, *, start: int, order: np.random.Generator | None
    ) -> Iterator[Batch]:
        kept: list[Rows] = []
        for rows in self._windows(windows, start=start, order=order):
            kept.append(rows)
            held = sum(len(part.ids_RF) for part in kept)
            if held < mine.step_rows:
                continue
            joined = _join(kept)
            whole = held - held % mine.step_rows
            for at in range(0, whole, mine.step_rows):
                yield _batch(joined.take(slice(at, at + mine.step_rows)), mine)
            kept = [joined.take(slice(whole, held))]
        if sum(len(part.ids_RF) for part in kept):
            yield _batch(_join(kept), mine)

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
        names = [*schema.id_names, *schema.dense_names, *schema.task_names]
        if absent := sorted(set(names) - set(file.schema_arrow.names)):
            raise Fault(str(group.file), got=f"no column {', '.join(absent)}", wanted="the schema's", remedy=_REMEDY)
        table = file.read_row_group(group.index, columns=names, use_threads=False)
        ids: npt.NDArray[np.int64] = _matrix(table, schema.id_names, place=group.file, dtype=pa.int64())
        for at, feature in enumerate(schema.features):
            _check_ids(ids[:, at], rows=schema.rows(feature.table), place=f"{group.file}: column '{feature.name}'")
        dense = _matrix(table, schema.dense_names, place=group.file, dtype=pa.float32())
        labels = _matrix(table, schema.task_names, place=group.file, dtype=pa.float32())
        return Rows(ids, dense, labels)


def _row_groups(folder: Path) -> list[RowGroup]:
    found = []
    for path in sorted(folder.glob("*.parquet")):
        try:
            metadata = pq.read_metadata(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise Fault(str(path), got=str(error), wanted="a whole parquet file", remedy=_REMEDY) from None
        found += [RowGroup(path, at, metadata.row_group(at).num_rows) for at in range(metadata.num_row_groups)]
    if not sum(group.rows for group in found):
        raise Fault(str(folder), got="no rows", wanted="parquet shards with at least one row", remedy=_REMEDY)
    return found


def _matrix(table: pa.Table, names: Sequence[str], *, place: Path, dtype: pa.DataType) -> npt.NDArray[Any]:
    """Columns side by side, row after row."""
    matrix = np.empty((table.num_rows, len(names)), np.int64 if dtype == pa.int64() else np.float32)
    for at, name in enumerate(names):
        column = table[name]
        if column.type != dtype or column.null_count:
            got = f"column '{name}' of {column.type} with {column.null_count} nulls"
            raise Fault(str(place), got=got, wanted=f"{dtype} without nulls", remedy=_REMEDY)
        matrix[:, at] = column.to_numpy()
    return matrix


def _check_ids(ids: npt.NDArray[np.int64], *, rows: int, place: str) -> None:
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= rows):
        bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise Fault(place, got=f"id {bad}", wanted=f"ids from 0 to {rows - 1}", remedy=_REMEDY)


def _join(parts: Sequence[Rows]) -> Rows:
    return parts[0] if len(parts) == 1 else Rows(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _batch(rows: Rows, mine: Slice) -> Batch:
    """This rank's slice of one step, padded to full size with rows of weight 0."""
    real = len(rows.ids_RF)
    own = rows.take(slice(mine.rank * mine.batch_size, (mine.rank + 1) * mine.batch_size))
    padding = mine.batch_size - len(own.ids_RF)
    weights_B = torch.ones(mine.batch_size)
    weights_B[mine.batch_size - padding :] = 0
    ids, dense, labels = (torch.from_numpy(np.pad(part, ((0, padding), (0, 0)))) for part in own)
    return Batch(ids, dense, labels, weights_B, global_rows=real)


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, made by a thread that stays a few ahead and ends with the reader; its error is raised here."""
    made: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(_AHEAD)
    stop = threading.Event()
    thread = threading.Thread(target=_make, args=(items, made), kwargs={"stop": stop}, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        stop.set()
        thread.join()


def _make(
    items: Iterator[T], made: "queue.Queue[tuple[T | None, BaseException | None]]", *, stop: threading.Event
) -> None:
    """Puts the items, then None; or the error that ended them."""
    try:
        for item in items:
            if not _put(made, (item, None), stop=stop):
                return
        _put(made, (None, None), stop=stop)
    except BaseException as error:
        _put(made, (None, error), stop=stop)


def _put(
    made: "queue.Queue[tuple[T | None, BaseException | None]]",
    pair: tuple[T | None, BaseException | None],
    *,
    stop: threading.Event,
) -> bool:
    """Waits for room; False where the reader has gone."""
    while not stop.is_set():
        with contextlib.suppress(queue.Full):
            made.put(pair, timeout=0.1)
            return True
    return False
