"""Lines of libsvm (`label id:value ...`) and libffm (`label field:id:value ...`) as a label and list columns."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from etl.data_spec import Data
from etl.faults import Fault

_BLOCK_BYTES = 4 << 20
_TOKENS = {
    "libsvm": r"^(?P<id>[^:]+):(?P<value>[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)$",
    "libffm": r"^(?P<field>[^:]+):(?P<id>[^:]+):(?P<value>[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)$",
}
_WANTED = {"libsvm": "label id:value id:value ...", "libffm": "label field:id:value field:id:value ..."}


def libsvm_batches(data: Data, path: Path, *, names: list[str]) -> Iterator[pa.RecordBatch]:
    """The named ones of the columns `label` (text), `ids` and `values` (lists of texts); a pair of lists a field.

    A line that holds nothing, or starts as a comment, is no row.

    Raises:
        Fault: a line of another form, or a column that the format does not have.
    """
    _check_names(data, path, names=names)
    for first, lines in _lines(path):
        kept = np.array([not _skipped(line, data.comment) for line in lines], dtype=bool)
        numbers = first + np.flatnonzero(kept)
        rows = pa.array([line for line, keep in zip(lines, kept, strict=True) if keep], pa.large_string())
        if len(rows):
            yield _columns(data, rows, path=path, numbers=numbers.tolist()).select(names)


def _check_names(data: Data, path: Path, *, names: list[str]) -> None:
    lists = "(ids|values)_.+" if data.format == "libffm" else "ids|values"
    if unknown := [name for name in names if name != "label" and not re.fullmatch(lists, name)]:
        wanted = "label, ids_<field> and values_<field>" if data.format == "libffm" else "label, ids and values"
        remedy = "set 'column' of the feature or the task"
        raise Fault(
            f"{path}, column '{unknown[0]}'", got=f"no such column in {data.format}", wanted=wanted, remedy=remedy
        )


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Whole lines, some MB at a time, with the number of the first from 1."""
    first, rest = 1, b""
    with pa.input_stream(str(path), compression="detect") as stream:
        while block := stream.read(_BLOCK_BYTES):
            whole, newline, rest = (rest + block).rpartition(b"\n")
            if newline:
                lines = whole.decode().split("\n")
                yield first, lines
                first += len(lines)
    if rest:
        yield first, [rest.decode()]


def _skipped(line: str, comment: str | None) -> bool:
    return not line.strip() or (comment is not None and line.startswith(comment))


def _columns(data: Data, rows: pa.Array, *, path: Path, numbers: list[int]) -> "_Lines":
    """Splits the lines; what has another form is reported with its number."""
    parts = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(rows))
    offsets = np.asarray(parts.offsets).astype(np.int64)
    words = parts.values
    first = np.zeros(len(words), dtype=bool)
    first[offsets[:-1]] = True
    label, tokens = words.filter(pa.array(first)), words.filter(pa.array(~first))
    row = np.repeat(np.arange(len(rows)), np.diff(offsets) - 1)
    found = pc.extract_regex(tokens, _TOKENS[data.format])
    if (colon := np.asarray(pc.match_substring(label, ":"))).any():
        at = int(np.argmax(colon))
        raise _malformed(data, f"{path}: line {numbers[at]}", got=f"'{label[at].as_py()}' where the label stands")
    if found.null_count:
        at = int(np.argmax(np.asarray(found.is_null())))
        raise _malformed(data, f"{path}: line {numbers[int(row[at])]}", got=f"'{tokens[at].as_py()}'")
    return _Lines(label, found, row=row)


def _malformed(data: Data, place: str, *, got: str) -> Fault:
    return Fault(place, got=got, wanted=_WANTED[data.format], remedy="mend the line, or name its start in data.comment")


class _Lines:
    """Parsed lines; list columns are made as they are asked for."""

    def __init__(self, label: pa.Array, tokens: pa.StructArray, *, row: np.ndarray) -> None:  # type: ignore[type-arg]
        self._label, self._tokens, self._row = label, tokens, row

    def select(self, names: list[str]) -> pa.RecordBatch:
        """The named columns; a field that no line names is an empty list in each row."""
        return pa.record_batch({name: self._label if name == "label" else self._list(name) for name in names})

    def _list(self, name: str) -> pa.Array:
        part, _, field = name.partition("_")
        values, row = self._tokens.field("id" if part == "ids" else "value"), self._row
        if field:
            mine = np.asarray(pc.equal(self._tokens.field("field"), field))
            values, row = values.filter(pa.array(mine)), row[mine]
        offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(self._label)))])
        return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)
