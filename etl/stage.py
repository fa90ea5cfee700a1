"""Raw files -> one typed parquet a split: rows divided, histories added, negatives drawn, labels checked."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from etl.faults import Fault
from etl.formats import files
from etl.histories import ROW, HistoryLog
from etl.negatives import Sampler
from etl.pack import ARROW, inner_type
from etl.reader import SPLIT, Reader
from etl.spec import FeatureSpec
from etl.splits import SPLITS, division

Report = Callable[[str, int], None]
_GROUP_ROWS = 65_536
_OWN = (ROW, SPLIT, "history:", "negatives:")


def stage(spec: FeatureSpec, folder: Path, *, report: Report) -> dict[str, dict[str, float]]:
    """Writes `<split>.parquet` in the order of the raw rows; returns the positive rate of each label by split.

    Rows pass in batches. Only what histories and draws look up is held in memory, see there.

    Raises:
        Fault: whatever is wrong with the raw files, a split without rows, or training labels of one class.
    """
    derived = bool(spec.data.histories or spec.data.negatives)
    staged = [folder / f"{split}{'.log' if derived else ''}.parquet" for split in SPLITS]
    _read(spec, staged, report=report)
    if derived:
        _derive(spec, staged, report=report)
        staged = [folder / f"{split}.parquet" for split in SPLITS]
    return {split: _label_rates(spec, path, split=split) for split, path in zip(SPLITS, staged, strict=True)}


def _read(spec: FeatureSpec, staged: list[Path], *, report: Report) -> None:
    """The typed rows of each split, with their number in the log where rows or columns are made from it."""
    data, reader, row = spec.data, Reader(spec), 0
    paths = {split: files(getattr(data, split), what=split) for split in SPLITS}
    divide = division(data, reader, paths=paths["train"], scratch=staged[0].parent)
    writers = [_Writer(path, split=split) for path, split in zip(staged, SPLITS, strict=True)]
    for at, split in enumerate(SPLITS):
        first = row
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
            report(f"read {split}", row - first)
    for writer in writers:
        writer.close()


def _derive(spec: FeatureSpec, staged: list[Path], *, report: Report) -> None:
    """Adds histories, drops rows that have too short ones, draws negatives; removes what it read."""
    dtypes = {name: pa.large_list(ARROW[inner_type(dtype)]) for name, dtype in spec.raw_columns().items()}
    histories = [HistoryLog(h, at, staged=staged, dtypes=dtypes) for at, h in enumerate(spec.data.histories)]
    sampler = Sampler(spec.data.negatives, staged=staged) if spec.data.negatives else None
    for path, split in zip(staged, SPLITS, strict=True):
        writer, rows = _Writer(path.with_name(f"{split}.parquet"), split=split), 0
        for batch in pq.ParquetFile(path).iter_batches():
            batch = _with_histories(batch, histories)
            batch = sampler.expand(batch) if sampler else batch
            writer.write(_without_own(batch))
            rows += batch.num_rows
            report(f"derive {split}", rows)
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
            remedy = "give more rows, raise the split's fraction or move its bounds, or lower min_length of a history"
            raise Fault(f"data.{self._split}", got="no rows", wanted="at least one", remedy=remedy)


def _label_rates(spec: FeatureSpec, staged: Path, *, split: str) -> dict[str, float]:
    """Share of ones by task. Raises Fault where training has one class only."""
    file = pq.ParquetFile(staged)
    ones = {task.name: 0.0 for task in spec.tasks}
    for batch in file.iter_batches(columns=[f"label:{name}" for name in ones]):
        labels = {name: batch[f"label:{name}"].to_numpy() for name in ones}
        for task in spec.tasks:
            ones[task.name] += float(labels[task.name].sum())
            if task.implies and (wrong := int((labels[task.name] > labels[task.implies]).sum())):
                got = f"{wrong} rows with '{task.name}' 1 and '{task.implies}' 0"
                remedy = f"mend the rows, or drop 'implies' of task '{task.name}'"
                raise Fault(f"data.{split}", got=got, wanted=f"'{task.implies}' 1 there", remedy=remedy)
    rates = {name: count / file.metadata.num_rows for name, count in ones.items()}
    if split == "train" and (flat := [name for name, rate in rates.items() if rate in (0.0, 1.0)]):
        got = f"only class {rates[flat[0]]:.0f} for task '{flat[0]}'"
        remedy = "check the task's column and its positive and negative texts"
        raise Fault("data.train", got=got, wanted="both classes in the training rows", remedy=remedy)
    return rates
