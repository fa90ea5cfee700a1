"""Raw files -> one typed parquet a split: rows divided, histories added, negatives drawn, labels checked."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from etl.formats import files, row_total
from etl.histories import HistoryLog
from etl.negatives import Sampler
from etl.origin import ROW, OriginWriter, origin_path
from etl.pack import ARROW, inner_type
from etl.reader import SPLIT, Part, Reader
from etl.spec import FeatureSpec
from etl.splits import SPLITS, division
from etl.typed import Columns, Report, Typed, count_labels, label_columns, no_rows

_GROUP_ROWS = 65_536
_OWN = (ROW, SPLIT, "history:", "negatives:")


def stage(spec: FeatureSpec, folder: Path, *, report: Report, dataset: Path | None = None) -> dict[str, Typed]:
    """Writes `<split>.parquet` in the order of the raw rows, and into a dataset folder where they come from (`origin`).

    Rows pass in batches. Only what histories and draws look up is held in memory, see there.

    Raises:
        Fault: whatever is wrong with the raw files, a split without rows, or training labels of one class.
    """
    derived, reader = bool(spec.data.histories or spec.data.negatives), Reader(spec)
    origin = dataset if derived or spec.data.divided else None
    writers = [_Writer(folder / f"{split}.parquet", split=split, dataset=origin) for split in SPLITS]
    if derived:
        logs = [_Writer(folder / f"{split}.log.parquet", split=split, is_log=True) for split in SPLITS]
        _read(spec, logs, reader=reader, report=report)
        _derive(spec, [log.path for log in logs], writers=writers, report=report)
    else:
        _read(spec, writers, reader=reader, report=report)
    found = {}
    for split in SPLITS:
        path = folder / f"{split}.parquet"
        raw = None if reader.by_day else files(getattr(spec.data, split) or spec.data.train, what=split)
        labels = pq.ParquetFile(path).iter_batches(columns=label_columns(spec))
        counts = count_labels(spec, labels, split=split, paths=raw)
        own = {str(raw): reader.rows[raw] for raw in files(getattr(spec.data, split), what=split)}
        found[split] = Typed(Columns.staged(path), counts, own, parts=partial(_staged_parts, path))
    return found


def _staged_parts(path: Path) -> Iterator[Part]:
    for batch in pq.ParquetFile(path).iter_batches():
        yield Part(batch.num_rows, partial(_itself, batch))


def _itself(batch: pa.RecordBatch) -> pa.RecordBatch:
    return batch


def _read(spec: FeatureSpec, writers: Sequence["_Writer"], *, reader: Reader, report: Report) -> None:
    """The typed rows of each split, with their numbers among all raw rows where they do not stand in that order."""
    data, row = spec.data, 0
    paths = {split: files(getattr(data, split), what=split) for split in SPLITS}
    divide = division(data, reader, paths=paths["train"], scratch=writers[0].path.parent)
    numbered = bool(data.divided or data.histories or data.negatives)
    for at, split in enumerate(SPLITS):
        first, total = row, row_total(data, paths[split])
        report(f"read {split}", 0, total=total)
        for batch in reader.batches(paths[split]):
            parts = divide(batch, row) if split == "train" else np.full(batch.num_rows, at, np.int8)
            if numbered:
                batch = batch.append_column(ROW, pa.array(np.arange(row, row + batch.num_rows, dtype=np.int64)))
            for part, writer in enumerate(writers):
                mine = parts == part
                if mine.any():
                    writer.write(batch if mine.all() else batch.filter(pa.array(mine)))
            row += batch.num_rows
            report(f"read {split}", row - first, total=total)
        report(f"read {split}", row - first, total=row - first)
    for writer in writers:
        writer.close()


def _derive(spec: FeatureSpec, staged: list[Path], *, writers: Sequence["_Writer"], report: Report) -> None:
    """Adds histories, drops rows that have too short ones, draws negatives; removes what it read."""
    dtypes = {name: pa.large_list(ARROW[inner_type(dtype)]) for name, dtype in spec.raw_columns().items()}
    histories = [HistoryLog(h, at, staged=staged, dtypes=dtypes) for at, h in enumerate(spec.data.histories)]
    sampler = Sampler(spec.data.negatives, staged=staged) if spec.data.negatives else None
    for path, split, writer in zip(staged, SPLITS, writers, strict=True):
        rows, log = 0, pq.ParquetFile(path)
        report(f"derive {split}", 0, total=log.metadata.num_rows)
        for batch in log.iter_batches():
            rows += batch.num_rows
            batch = _with_histories(batch, histories)
            writer.write(sampler.expand(batch) if sampler else batch)
            report(f"derive {split}", rows, total=log.metadata.num_rows)
        writer.close()
        path.unlink()


def _with_histories(batch: pa.RecordBatch, histories: list[HistoryLog]) -> pa.RecordBatch:
    rows = batch[ROW].to_numpy()
    kept = np.ones(batch.num_rows, dtype=bool)
    for history in histories:
        kept &= history.lengths(rows) >= history.min_length
    batch, rows = batch.filter(pa.array(kept)), rows[kept]
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    for history in histories:
        columns |= history.columns(rows)
    return pa.record_batch(columns)


class _Writer:
    """One split's staged rows, written as they come, in row groups of a size that reads well."""

    def __init__(self, path: Path, *, split: str, is_log: bool = False, dataset: Path | None = None) -> None:
        """A log keeps the columns that only this stage reads. A dataset folder, where given, gets row numbers."""
        self.path, self._split, self._is_log, self._rows = path, split, is_log, 0
        self._origin = OriginWriter(origin_path(dataset, split)) if dataset else None
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pa.RecordBatch] = []

    def write(self, batch: pa.RecordBatch) -> None:
        self._waiting.append(batch)
        self._rows += batch.num_rows
        if sum(waiting.num_rows for waiting in self._waiting) >= _GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        table, self._waiting = pa.Table.from_batches(self._waiting), []
        if self._origin:
            self._origin.write(table[ROW])
        if not self._is_log:
            table = table.select([name for name in table.column_names if not name.startswith(_OWN)])
        if self._writer is None:
            texts = [field.name for field in table.schema if pa.types.is_large_string(field.type)]
            self._writer = pq.ParquetWriter(self.path, table.schema, use_dictionary=texts, write_statistics=False)
        self._writer.write_table(table)

    def close(self) -> None:
        """Raises Fault where no row came."""
        if self._waiting:
            self._flush()
        for writer in filter(None, (self._writer, self._origin)):
            writer.close()
        if not self._rows:
            raise no_rows(self._split)
