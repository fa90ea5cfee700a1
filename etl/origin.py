"""Where a split's rows come from: of each the raw file, and which of that file's rows it is.

Rows that were neither divided nor dropped nor drawn stand in the order of their files, of which the manifest says how
many rows each has. Of others `origin/<split>.parquet` holds one number a row, in a few bits: which row it is of all raw
files, counted from 0 through those of training, of validation and of the test. A drawn row has the number of the row
before it, for which it was drawn.
"""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from etl.artifact import Json, read_json
from etl.faults import Fault

ROW = "row:"
"""The column that numbers all rows of the raw files while they are staged."""

_FOLDER = "origin"
_SCHEMA = pa.schema([pa.field(ROW, pa.int64(), nullable=False)])


def origin_path(folder: Path, split: str) -> Path:
    """Where a dataset folder has the numbers of a split's rows, if it needs any."""
    return folder / _FOLDER / f"{split}.parquet"


class OriginWriter:
    """Writes the numbers of a split's rows as they come."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        encoding = {ROW: "DELTA_BINARY_PACKED"}
        self._writer = pq.ParquetWriter(
            path, _SCHEMA, use_dictionary=False, column_encoding=encoding, compression="none", write_statistics=False
        )

    def write(self, numbers: pa.ChunkedArray) -> None:
        """Int64, of the next rows."""
        self._writer.write_table(pa.table([numbers], schema=_SCHEMA))

    def close(self) -> None:
        """Completes the file."""
        self._writer.close()


def locate(folder: Path, split: str, *, numbers: Sequence[int]) -> list[str]:
    """`raw_place` of each of these rows.

    Raises:
        Fault: no dataset folder that says it, no such split, or no such row.
    """
    manifest, again = folder / "manifest.json", "run 'python -m etl run' again"
    splits = read_json(manifest, remedy=again).get("splits", {})
    if split not in splits:
        wanted, remedy = f"one of {', '.join(splits)}", "name another split"
        raise Fault(str(manifest), got=f"no split '{split}'", wanted=wanted, remedy=remedy)
    rows = splits[split]["rows"]
    if beyond := [number for number in numbers if not 0 <= number < rows]:
        got, wanted = f"no row {beyond[0]} of {split}", f"rows from 0 to {rows - 1}"
        raise Fault(str(manifest), got=got, wanted=wanted, remedy="count over the shards in the order of their names")
    if "files" not in splits[split]:
        raise Fault(str(manifest), got="no rows of the raw files", wanted="those of each split", remedy=again)
    return [_place(folder, split, number=number, splits=splits) for number in numbers]


def raw_place(folder: Path, split: str, *, number: int) -> str | None:
    """The raw file and the row in it, counted from 1, of row `number` of a split, counted from 0.

    Of a drawn row the row that it was drawn for. None where the folder has no manifest that says it.
    """
    manifest = folder / "manifest.json"
    splits = read_json(manifest, remedy="run 'python -m etl run' again").get("splits", {}) if manifest.is_file() else {}
    return _place(folder, split, number=number, splits=splits) if "files" in splits.get(split, {}) else None


def _place(folder: Path, split: str, *, number: int, splits: Json) -> str:
    """`splits` is the manifest's part about them."""
    names = list(splits)
    files = [(file, rows) for name in names for file, rows in splits[name]["files"].items()]
    path, drawn = origin_path(folder, split), False
    if path.is_file():
        row = _number(path, number)
        drawn = number > 0 and _number(path, number - 1) == row
    else:
        row = number + sum(sum(splits[name]["files"].values()) for name in names[: names.index(split)])
    for (file, rows), end in zip(files, accumulate(rows for _, rows in files), strict=True):
        if row < end:
            return f"{'drawn for ' if drawn else ''}{file}: row {row - end + rows + 1}"
    raise IndexError(f"{folder}: no row {number} of {split}")


def _number(path: Path, at: int) -> int:
    """One of the numbers of a file."""
    file = pq.ParquetFile(path)
    for group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if at < rows:
            return int(file.read_row_group(group)[ROW][at].as_py())
        at -= rows
    raise IndexError(f"{path}: {at + 1} rows too few")
