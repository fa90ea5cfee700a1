"""The typed rows of a split, what is counted of their labels, and the way without a copy: parquet that is typed."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from etl.artifact import Json
from etl.faults import Fault
from etl.formats import files, row_total
from etl.pack import inner_type
from etl.reader import DAY, Part, Reader
from etl.spec import FeatureSpec, Task
from etl.splits import SPLITS


class Report(Protocol):
    """Hears of a stage's rows so far, and of all of them where they are known."""

    def __call__(self, stage: str, rows: int, /, *, total: int | None = None) -> None: ...


@dataclass(frozen=True)
class Labels:
    """Rows and the share of ones by task, and both by day or by raw file."""

    rows: int
    rates: dict[str, float]
    parts: Json


@dataclass(frozen=True)
class Columns:
    """Typed rows, column by column: a query over all of them, and the parquet files that it reads in this order."""

    rows: pl.LazyFrame
    paths: tuple[Path, ...]

    def values(self, name: str) -> Iterator[pa.Array]:
        """One column in batches; of lists their values."""
        for path, footer in zip(self.paths, self._footers, strict=True):
            for batch in pq.ParquetFile(path, metadata=footer).iter_batches(columns=[name], use_threads=False):
                column = batch.column(0)
                yield column.flatten() if pa.types.is_nested(column.type) else column

    @cached_property
    def _footers(self) -> list[pq.FileMetaData]:
        """Parsed once: for a narrow column that takes as long as its values."""
        return [pq.read_metadata(path) for path in self.paths]

    @classmethod
    def staged(cls, path: Path) -> "Columns":
        """Of a file that `etl.stage` wrote."""
        return cls(pl.scan_parquet(path), (path,))


@dataclass(frozen=True)
class Typed:
    """The rows of a split: the fit takes their columns, the encoder parts of them; `files` are the split's own raw
    files, with their rows."""

    columns: Columns
    labels: Labels
    files: dict[str, int]
    parts: Callable[[], Iterator[Part]]

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All parts, typed."""
        return (part.typed() for part in self.parts())


def label_columns(spec: FeatureSpec) -> list[str]:
    """The columns that `count_labels` takes."""
    return [*(f"label:{task.name}" for task in spec.tasks), DAY]


def count_labels(
    spec: FeatureSpec, batches: Iterable[pa.RecordBatch], *, split: str, paths: Sequence[Path] | None
) -> Labels:
    """Counts the `label_columns` of a split; parts are the raw files at `paths`, or days where there are none.

    Raises:
        Fault: no rows, training labels of one class, or a label without the one that it implies.
    """
    sums: dict[int, list[int]] = {}
    for batch in batches:
        labels = {task.name: batch[f"label:{task.name}"].to_numpy() for task in spec.tasks}
        for day, *found in _by_day(batch[DAY], labels.values()):
            before = sums.get(day, [0] * len(found))
            sums[day] = [old + int(new) for old, new in zip(before, found, strict=True)]
        for task in spec.tasks:
            if task.implies and (wrong := int((labels[task.name] > labels[task.implies]).sum())):
                got = f"{wrong} rows with '{task.name}' 1 and '{task.implies}' 0"
                remedy = f"mend the rows, or drop 'implies' of task '{task.name}'"
                raise Fault(f"data.{split}", got=got, wanted=f"'{task.implies}' 1 there", remedy=remedy)
    if not sums:
        raise no_rows(split)
    rows, *ones = (sum(column) for column in zip(*sums.values(), strict=True))
    rates = {task.name: count / rows for task, count in zip(spec.tasks, ones, strict=True)}
    if split == "train" and (flat := [name for name, rate in rates.items() if rate in (0.0, 1.0)]):
        got = f"only class {rates[flat[0]]:.0f} for task '{flat[0]}'"
        remedy = "check the task's column and its positive and negative texts"
        raise Fault("data.train", got=got, wanted="both classes in the training rows", remedy=remedy)
    parts = [
        {"name": _named(day, paths), "rows": n, "ones": dict(zip(rates, counted, strict=True))}
        for day, (n, *counted) in sorted(sums.items())
    ]
    return Labels(rows, rates, {"by": "day" if paths is None else "file", "parts": parts})


def _by_day(days: pa.Array, labels: Collection[npt.NDArray[np.float32]]) -> Iterator[tuple[int, ...]]:
    """Each day with its rows and its ones of every label."""
    if len(days) and (ends := pc.min_max(days))["min"] == ends["max"]:
        yield days[0].as_py(), len(days), *(np.count_nonzero(ones) for ones in labels)
        return
    by_day = days.dictionary_encode()
    at = by_day.indices.to_numpy()
    yield from zip(
        by_day.dictionary.to_pylist(), np.bincount(at), *(np.bincount(at, ones) for ones in labels), strict=True
    )


def no_rows(split: str) -> Fault:
    """The fault of an empty split."""
    remedy = "give more rows, raise the split's fraction or move its bounds, or lower min_length of a history"
    return Fault(f"data.{split}", got="no rows", wanted="at least one", remedy=remedy)


def _named(day: int, paths: Sequence[Path] | None) -> str:
    return (date(1970, 1, 1) + timedelta(days=day)).isoformat() if paths is None else str(paths[day])


def typed_files(spec: FeatureSpec, *, report: Report) -> dict[str, Typed] | None:
    """The raw files themselves, where they are parquet of the spec's types and no row or column is made from others.

    Rows are checked as they are encoded; before that, of a file, only its labels are read. None where rows have to be
    staged, or where a file can't be read, which staging tells.

    Raises:
        Fault: as `count_labels`, or an unreadable label.
    """
    data = spec.data
    if data.format != "parquet" or data.divided or data.histories or data.negatives:
        return None
    found, paths = {}, {split: tuple(files(getattr(data, split), what=split)) for split in SPLITS}
    if not _are_typed(spec, [path for split in SPLITS for path in paths[split]]):
        return None
    for split, own in paths.items():
        report(f"read {split}", 0, total=row_total(data, own))
        reader = Reader(spec)
        labels = count_labels(spec, reader.labels(own), split=split, paths=own)
        report(f"read {split}", labels.rows, total=labels.rows)
        rows = {str(path): reader.rows[path] for path in own}
        found[split] = Typed(Columns(_scan(spec, own), own), labels, rows, parts=partial(reader.parts, own))
    return found


def _are_typed(spec: FeatureSpec, paths: Sequence[Path]) -> bool:
    """Whether a query of polars reads these files as the `Reader` does: one type a column, and a plain one."""
    wanted = spec.file_columns()
    names = [*wanted, *(task.label for task in spec.tasks)]
    seen = set()
    for path in paths:
        try:
            schema = pq.read_schema(path)
        except (pa.ArrowException, OSError):
            return False
        if len(set(schema.names)) < len(schema.names) or not set(names) <= set(schema.names):
            return False
        seen.add(tuple(schema.field(name).type for name in names))
    types = dict(zip(names, seen.pop(), strict=True)) if seen else {}
    features = all(_is_plain(types[name], dtype) for name, dtype in wanted.items())
    return not seen and features and all(_is_plain_label(types[task.label], task) for task in spec.tasks)


def _is_plain(kind: pa.DataType, dtype: str) -> bool:
    inner = inner_type(dtype)
    if inner != dtype:
        return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _is_plain(kind.value_type, inner)
    if inner == "string":
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
    return bool(pa.types.is_integer(kind) or (inner == "float64" and kind in (pa.float32(), pa.float64())))


def _is_plain_label(kind: pa.DataType, task: Task) -> bool:
    if task.positive:
        return _is_plain(kind, "string")
    return _is_plain(kind, "float64") or pa.types.is_boolean(kind)


_POLARS = {"string": pl.String, "int64": pl.Int64, "float64": pl.Float64}


def _scan(spec: FeatureSpec, paths: Sequence[Path]) -> pl.LazyFrame:
    """The features' columns and the labels, as they would be staged; what doesn't fit is null, the encoder's fault."""
    rows = pl.scan_parquet(list(paths), extra_columns="ignore", glob=False, hive_partitioning=False)
    columns, kinds = [], rows.collect_schema()
    for name, dtype in spec.file_columns().items():
        inner = _POLARS[inner_type(dtype)]
        kind = pl.List(inner) if dtype != inner_type(dtype) else inner
        column = pl.col(name) if kinds[name] == kind else pl.col(name).cast(kind, strict=False)
        columns.append(column.fill_nan(None) if dtype == "float64" else column)
    for task in spec.tasks:
        one = pl.col(task.label).is_in(task.positive) if task.positive else pl.col(task.label)
        columns.append(one.cast(pl.Float32).alias(f"label:{task.name}"))
    return rows.select(columns)


def of_size(batches: Iterable[pa.RecordBatch], *, rows: int) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of this size; the last one may be smaller."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        while batch.num_rows:
            head = batch.slice(0, rows - sum(part.num_rows for part in waiting))
            batch = batch.slice(head.num_rows)
            waiting.append(head)
            if sum(part.num_rows for part in waiting) == rows:
                yield _joined(waiting)
                waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    """One batch, of at least one."""
    return batches[0] if len(batches) == 1 else pa.Table.from_batches(batches).combine_chunks().to_batches()[0]
