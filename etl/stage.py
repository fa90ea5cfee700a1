"""Raw files -> one typed parquet a split: rows divided, histories added, negatives drawn, labels checked."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from etl.formats import files, row_total
from etl.histories import ROW, HistoryLog
from etl.negatives import Sampler
from etl.pack import ARROW, inner_type
from etl.reader import SPLIT, Part, Reader
from etl.spec import FeatureSpec
from etl.splits import SPLITS, division
from etl.typed import Columns, Report, Typed, count_labels, label_columns, no_rows

_GROUP_ROWS = 65_536
_OWN = (ROW, SPLIT, "history:", "negatives:")


def stage(spec: FeatureSpec, folder: Path, *, report: Report) -> dict[str, Typed]:
    """Writes `<split>.parquet` in the order of the raw rows.

    Rows pass in batches. Only what histories and draws look up is held in memory, see there.

    Raises:
        Fault: whatever is wrong with the raw files, a split without rows, or training labels of one class.
    """
    derived = bool(spec.data.histories or spec.data.negatives)
    reader = Reader(spec)
    staged = [folder / f"{split}{'.log' if derived else ''}.parquet" for split in SPLITS]
    _read(spec, staged, reader=reader, report=report)
    if derived:
        _derive(spec, staged, report=report)
    found = {}
    for split in SPLITS:
        path = folder / f"{split}.parquet"
        raw = None if reader.by_day else files(getattr(spec.data, split) or spec.data.train, what=split)
        labels = pq.ParquetFile(path).iter_batches(columns=label_columns(spec))
        counts = count_labels(spec, labels, split=split, paths=raw)
        found[split] = Typed(Columns.staged(path), counts, parts=partial(_staged_parts, path))
    return found


def _staged_parts(path: Path) -> Iterator[Part]:
    for batch in pq.ParquetFile(path).iter_batches():
        yield Part(batch.num_rows, partial(_itself, batch))


def _itself(batch: pa.RecordBatch) -> pa.RecordBatch:
    return batch


def _read(spec: FeatureSpec, staged: list[Path], *, reader: Reader, report: Report) -> None:
    """The typed rows of each split, with their number in the log where rows or columns are made from it."""
    data, row = spec.data, 0
    paths = {split: files(getattr(data, split), what=split) for split in SPLITS}
    divide = division(data, reader, paths=paths["train"], scratch=staged[0].parent)
    writers = [_Writer(path, split=split) for path, split in zip(staged, SPLITS, strict=True)]
    for at, split in enumerate(SPLITS):
        first, total = row, row_total(data, paths[split])
        report(f"read {split}", 0, total=total)
        for batch in reader.batches(paths[split]):
            parts = divide(batch, row) if split == "train" else np.full(batch.num_rows, at, np.int8)
            if data.histories or data.negatives:
                batch = batch.append_column(ROW, pa.array(np.arange(row, row + batch.num_rows, dtype=np.int64)))
            else:
                batch = _without_own(batch)
            for part, writer in enumerate(writers):
                mine = parts == part
                if mine.any():
                    writer.write(batch if mine.all() else batch.filter(pa.array(mine)))
            row += batch.num_rows
            report(f"read {split}", row - first, total=total)
        report(f"read {split}", row - first, total=row - first)
    for writer in writers:
        writer.close()


def _derive(spec: FeatureSpec, staged: list[Path], *, report: Report) -> None:
    """Adds histories, drops rows that have too short ones, draws negatives; removes what it read."""
    dtypes = {name: pa.large_list(ARROW[inner_type(dtype)]) for name, dtype in spec.raw_columns().items()}
    histories = [HistoryLog(h, at, staged=staged, dtypes=dtypes) for at, h in enumerate(spec.data.histories)]
    sampler = Sampler(spec.data.negatives, staged=staged) if spec.data.negatives else None
    for path, split in zip(staged, SPLITS, strict=True):
        writer, rows = _Writer(path.with_name(f"{split}.parquet"), split=split), 0
        log = pq.ParquetFile(path)
        report(f"derive {split}", 0, total=log.metadata.num_rows)
        for batch in log.iter_batches():
            rows += batch.num_rows
            batch = _with_histories(batch, histories)
            batch = sampler.expand(batch) if sampler else batch
            writer.write(_without_own(batch))
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


def _without_own(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Without the columns that only this stage reads."""
    return batch.select([name for name in batch.schema.names if not name.startswith(_OWN)])


class _Writer:
    """One split's staged rows, written as they come, in row groups of a size that reads well."""

    def __init__(self, path: Path, *, split: str) -> None:
        self._path, self._split, self._rows = path, split, 0
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pa.RecordBatch] = []

    def write(self, batch: pa.RecordBatch) -> None:
        self._waiting.append(batch)
        self._rows += batch.num_rows
        if sum(waiting.num_rows for waiting in self._waiting) >= _GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        table, self._waiting = pa.Table.from_batches(self._waiting), []
        if self._writer is None:
            texts = [field.name for field in table.schema if pa.types.is_large_string(field.type)]
            self._writer = pq.ParquetWriter(self._path, table.schema, use_dictionary=texts, write_statistics=False)
        self._writer.write_table(table)

    def close(self) -> None:
        """Raises Fault where no row came."""
        if self._waiting:
            self._flush()
        if self._writer is not None:
            self._writer.close()
        if not self._rows:
            raise no_rows(self._split)
