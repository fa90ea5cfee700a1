"""The file formats: a file -> batches of the columns that are asked for, in bounded memory, not yet typed."""

import csv
import glob
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from etl.data_spec import TEXT_TABLES, Data
from etl.faults import Fault
from etl.libsvm import libsvm_batches

_BLOCK_BYTES = 4 << 20  # the reader holds up to 32 blocks that wait
_SAMPLED_FILES = 4
_BATCH_ROWS = 1 << 16


def files(patterns: Sequence[str], *, what: str) -> list[Path]:
    """The files that the patterns name, in order. Raises Fault where one names none, or two the same."""
    found: list[Path] = []
    for pattern in patterns:
        matches = sorted(glob.glob(pattern))
        if not matches:
            remedy = "check the path; relative paths start in the current folder"
            raise Fault(f"data.{what}", got=f"no file '{pattern}'", wanted="an existing file or glob", remedy=remedy)
        found += [Path(match) for match in matches]
    if repeated := [str(path) for path, times in Counter(found).items() if times > 1]:
        got, remedy = f"{', '.join(repeated)} twice", "narrow the globs"
        raise Fault(f"data.{what}", got=got, wanted="each file once", remedy=remedy)
    return found


def row_total(data: Data, paths: Sequence[Path]) -> int | None:
    """Rows of the files; of text about as many, as its first files have lines a byte on disk. Files that can't be read
    are left to `raw_batches`."""
    try:
        if data.format == "parquet":
            return sum(int(pq.read_metadata(path).num_rows) for path in paths)
        lines, size = np.sum([(0, 1), *map(_first_lines, paths[:_SAMPLED_FILES])], axis=0)
        return round(float(lines / size) * sum(path.stat().st_size for path in paths))
    except (pa.ArrowException, OSError):
        return None


def holds_rows(data: Data, path: Path) -> bool:
    """Whether a file holds a row; one that can't be read is left to `raw_batches`."""
    try:
        if data.format == "parquet":
            return bool(pq.read_metadata(path).num_rows)
        has_header = data.format in TEXT_TABLES and not data.columns
        return len(_leading(data, path)[1]) > has_header
    except (pa.ArrowException, OSError):
        return True


def _first_lines(path: Path) -> tuple[int, int]:
    """Lines of the first MBs, and the bytes on disk that were read for them."""
    packed = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}.get(path.suffix)
    with pa.OSFile(str(path)) as file:
        stream = pa.CompressedInputStream(file, packed) if packed else file
        return stream.read(_BLOCK_BYTES).count(b"\n"), file.tell()


def column_names(data: Data, path: Path) -> list[str]:
    """The columns of a file, in its order; of libffm those that do not depend on its lines.

    Raises:
        Fault: an unreadable file, or one without a header line.
    """
    try:
        if data.format == "parquet":
            return list(pq.read_schema(path).names)
        if data.format not in TEXT_TABLES:
            return ["label", "ids", "values"] if data.format == "libsvm" else ["label"]
        return data.columns or _header(data, _leading(data, path)[1])
    except (pa.ArrowException, OSError, IndexError, csv.Error) as e:
        wanted, remedy = f"a readable {data.format} file with named columns", "check the file, and [data] columns"
        raise Fault(str(path), got=str(e).strip() or "no header", wanted=wanted, remedy=remedy) from None


def raw_batches(data: Data, path: Path, *, names: list[str]) -> Iterator[pa.RecordBatch]:
    """Parquet columns as they are typed; csv columns as trimmed texts with nulls; libsvm columns as texts and lists.

    Raises:
        Fault: an unreadable or truncated file, a missing column, a malformed line.
    """
    read = {"parquet": _parquet, "libsvm": libsvm_batches, "libffm": libsvm_batches}.get(data.format, _csv)
    try:
        yield from read(data, path, names=names)
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError, csv.Error) as e:
        remedy = "check the file, and [data] format, columns and comment"
        wanted = f"a readable {data.format} file with the columns {', '.join(names)}"
        raise Fault(str(path), got=str(e).strip(), wanted=wanted, remedy=remedy) from None


def _parquet(data: Data, path: Path, *, names: list[str]) -> Iterator[pa.RecordBatch]:
    file = pq.ParquetFile(path)
    _check_columns(file.schema_arrow.names, names)
    rows = _BATCH_ROWS * max(1, 16 // max(1, len(names)))  # few columns: threads wait less for each other
    yield from file.iter_batches(batch_size=rows, columns=names, use_threads=False)  # others have the cores


def _check_columns(present: list[str], names: list[str]) -> None:
    if absent := [name for name in names if name not in present]:
        raise pa.ArrowKeyError(f"no column {', '.join(absent)}; it has {', '.join(present)}")
    if repeated := [name for name in names if present.count(name) > 1]:
        raise pa.ArrowKeyError(f"column {', '.join(repeated)} twice")


def _csv(data: Data, path: Path, *, names: list[str]) -> Iterator[pa.RecordBatch]:
    skipped, head = _leading(data, path)
    columns = data.columns
    if not columns and head:
        columns = _header(data, head)
        skipped += 1
        _check_columns(columns, names)
    if len(head) == (0 if data.columns else 1):
        return  # a day without traffic
    with _uncommented(data, path) as stream:
        reader = pa_csv.open_csv(
            stream,
            pa_csv.ReadOptions(block_size=_BLOCK_BYTES, column_names=columns or None, skip_rows=skipped),
            pa_csv.ParseOptions(delimiter=_delimiter(data), quote_char=data.quotes or False),
            pa_csv.ConvertOptions(
                column_types={name: pa.large_string() for name in names},
                include_columns=names,
                strings_can_be_null=False,
            ),
        )
        for batch in reader:
            yield _clean(data, batch)


def _delimiter(data: Data) -> str:
    return "\t" if data.format == "tsv" else ","


def _header(data: Data, lines: list[str]) -> list[str]:
    """The names in the first of the lines, trimmed as values are."""
    if data.quotes is None:
        names = lines[0].split(_delimiter(data))
    else:
        names = next(csv.reader([lines[0]], delimiter=_delimiter(data), quotechar=data.quotes))
    return [name.strip() for name in names] if data.trim else names


def _uncommented(data: Data, path: Path) -> pa.NativeFile:
    """The bytes of a text file without its comment lines, however many fields these seem to have."""
    stream = pa.input_stream(str(path), compression="detect")
    return pa.TransformInputStream(stream, _Uncommented(data)) if data.comment else stream


class _Uncommented:
    """Whole lines of the blocks so far that are no comments; an empty block ends the file.

    A line within a quoted value is none, whatever it starts with.
    """

    def __init__(self, data: Data) -> None:
        self._comment, self._rest = (data.comment or "").encode(), b""
        self._quote, self._open = (data.quotes or "").encode(), False
        quote, delimiter = re.escape(self._quote), re.escape(_delimiter(data).encode())
        quoted = rb"(?:%b(?:[^%b]|%b%b)*(%b|\Z))?" % (quote, quote, quote, quote, quote) if quote else b"()"
        self._field = re.compile(quoted + rb"[^%b]*(?:%b|\Z)" % (delimiter, delimiter), re.DOTALL)

    def __call__(self, block: pa.Buffer) -> bytes:
        whole, newline, rest = (self._rest + bytes(block)).rpartition(b"\n")
        lines, self._rest = (whole + newline, rest) if block else (self._rest, b"")
        quoted = self._open or (self._quote and self._quote in lines)
        if not quoted and not lines.startswith(self._comment) and b"\n" + self._comment not in lines:
            return lines
        return b"".join(line for line in lines.splitlines(keepends=True) if self._is_kept(line))

    def _is_kept(self, line: bytes) -> bool:
        if not self._open and line.startswith(self._comment):
            return False
        if self._quote and self._quote in line:
            self._open = self._ends_within_quotes(self._quote + line if self._open else line)
        return True

    def _ends_within_quotes(self, line: bytes) -> bool:
        """Whether the last value is quoted and goes on in the next line; a quote within a plain value is a letter."""
        end, closing = 0, None
        while end < len(line) and (field := self._field.match(line, end)):
            end, closing = field.end(), field[1]
        return closing == b""


def _leading(data: Data, path: Path) -> tuple[int, list[str]]:
    """Lines before the first row, which the reader would take for the header or for the row's width; and up to two
    lines after them, the first of which is the header where files have one."""
    with _uncommented(data, path) as stream:
        lines = stream.read(1 << 20).splitlines()
    count = next((at for at, line in enumerate(lines) if line.strip()), len(lines))
    head = [line.decode("utf-8-sig", errors="replace") for line in lines[count:] if line.strip()]
    return count, head[:2]


def _clean(data: Data, batch: pa.RecordBatch) -> pa.RecordBatch:
    columns = zip(batch.schema.names, batch.columns, strict=True)
    return pa.record_batch({name: _cleaned(data, column) for name, column in columns})


def _cleaned(data: Data, texts: pa.Array) -> pa.Array:
    text = pc.utf8_trim_whitespace(texts) if data.trim else texts
    nulls = pa.array(data.null_values, pa.large_string())
    return pc.if_else(pc.is_in(text, nulls), pa.scalar(None, pa.large_string()), text)


def split_texts(data: Data, column: pa.Array, *, separator: str | None) -> pa.Array:
    """Texts with several values -> lists of them, cleaned as texts of one value are; other columns as they are."""
    if separator is None or not pa.types.is_large_string(column.type):
        return column
    lists = pc.split_pattern(column, separator)
    return pa.ListArray.from_arrays(lists.offsets, _cleaned(data, lists.values), mask=lists.is_null())
