"""Which training rows go to validation and to the test."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from etl.data_spec import Data
from etl.faults import Fault
from etl.reader import SPLIT, Reader
from etl.transform import MISSING_KEY, Int64s, mix

SPLITS = ("train", "valid", "test")
Parts = npt.NDArray[np.int8]
"""The place in SPLITS of each row."""
Divide = Callable[[pa.RecordBatch, int], Parts]
"""From a batch of training rows, and the position of its first row among all of them."""

_CHUNK = 1 << 18
_DIGIT = np.uint64(16)


def division(data: Data, reader: Reader, *, paths: Sequence[Path], scratch: Path) -> Divide:
    """How the rows of the training files are divided; does the pass over times or users that this takes.

    Shares of time are exact and take 8 bytes a row in `scratch`, not in memory; `last` holds users and times in memory.

    Raises:
        Fault: a time that is none, or bounds in the wrong order.
    """
    if not data.divided:
        return lambda batch, first: np.zeros(batch.num_rows, np.int8)
    if data.split.by == "time":
        return _by_time(data, reader, paths=paths, scratch=scratch)
    if data.split.by == "last":
        parts = _last(data, reader, paths=paths)
        return lambda batch, first: parts[first : first + batch.num_rows]
    start = mix(np.array([data.split.seed], np.int64)).view(np.int64)
    if data.split.by == "group":
        return lambda batch, first: _by_share(data, mix(batch[SPLIT].to_numpy() ^ start))
    return lambda batch, first: _by_share(data, mix(np.arange(first, first + batch.num_rows, dtype=np.int64) ^ start))


def _by_share(data: Data, mixed: npt.NDArray[np.uint64]) -> Parts:
    """By a hash of seed and position or group, whatever the batches."""
    share = mixed / np.float64(2**64)
    parts = np.zeros(len(share), np.int8)
    if not data.valid:
        parts[share < data.split.valid_fraction] = 1
    if not data.test and data.split.test_fraction:
        parts[share >= 1.0 - data.split.test_fraction] = 2
    return parts


def _by_time(data: Data, reader: Reader, *, paths: Sequence[Path], scratch: Path) -> Divide:
    """Rows at or after a time. Raises Fault where the test would start before validation does."""
    split = data.split
    place, name = "data.split", str(split.column)
    if split.bounded:
        for _ in reader.times(paths[:1], name):  # so that the clock of the column is known
            break
        valid, test = (
            None if given is None else reader.boundary(given, name=name, place=f"{place}.{key}")
            for key, given in (("valid_from", split.valid_from), ("test_from", split.test_from))
        )
    else:
        with tempfile.TemporaryFile(dir=scratch) as file:
            rows = 0
            for times in reader.times(paths, name):
                file.write(times.tobytes())
                rows += len(times)

            def chunks() -> Iterator[Int64s]:
                file.seek(0)
                while len(chunk := np.fromfile(file, np.int64, _CHUNK)):
                    yield chunk

            valid, test = _shares(data, chunks, rows=rows)
    if valid is not None and test is not None and valid > test:
        got = f"valid_from = {split.valid_from!r}, test_from = {split.test_from!r}"
        raise Fault(place, got=got, wanted="a test that starts after validation", remedy="exchange the two")

    def parts(batch: pa.RecordBatch, first: int) -> Parts:
        found = np.zeros(batch.num_rows, np.int8)
        for part, start in ((1, valid), (2, test)):
            if start is not None:
                found[batch[SPLIT].to_numpy() >= start] = part
        return found

    return parts


def _shares(data: Data, chunks: Callable[[], Iterator[Int64s]], *, rows: int) -> tuple[int | None, int | None]:
    """The times from which validation and test start: their shares of the rows, and what has the same time."""
    if not rows:
        return None, None
    tested = 0 if data.test else max(1, round(rows * (data.split.test_fraction or 0.0)))
    valid = 0 if data.valid else max(1, round(rows * data.split.valid_fraction))
    starts = (max(0, rows - tested - valid) if valid else None, max(0, rows - tested) if tested else None)
    first, second = (None if start is None else kth(chunks, start) for start in starts)
    return first, second


def kth(chunks: Callable[[], Iterator[Int64s]], k: int) -> int:
    """The value at position k of the sorted numbers, in four passes over their digits to the base 2^16."""
    prefix = np.uint64(0)
    for shift in (np.uint64(48), np.uint64(32), np.uint64(16), np.uint64(0)):
        counts = np.zeros(1 << 16, np.int64)
        for chunk in chunks():
            digits = _ordered(chunk) >> shift
            if shift < 48:
                digits = digits[digits >> _DIGIT == prefix]
            counts += np.bincount((digits & np.uint64(0xFFFF)).astype(np.int64), minlength=1 << 16)
        ends = np.cumsum(counts)
        digit = int(np.searchsorted(ends, k, side="right"))
        k -= int(ends[digit] - counts[digit])
        prefix = (prefix << _DIGIT) | np.uint64(digit)
    return int(_ordered(np.array([prefix]).view(np.int64)).view(np.int64)[0])


def _ordered(numbers: Int64s) -> npt.NDArray[np.uint64]:
    """Signed numbers as unsigned ones in the same order; its own inverse."""
    return numbers.view(np.uint64) ^ np.uint64(1 << 63)


def _last(data: Data, reader: Reader, *, paths: Sequence[Path]) -> Parts:
    """Each user's last row to the test, the one before to validation; the first stays, and rows without a user do."""
    columns = list(reader.users(paths, user=str(data.split.column), time=str(data.split.time)))
    if not columns:
        return np.zeros(0, np.int8)
    user, time = (np.concatenate(part) for part in zip(*columns, strict=True))
    order = np.lexsort((time, user))  # stable: of equal times the later row counts as newer
    edges = np.flatnonzero(np.diff(user[order])) + 1
    first, end = np.concatenate([[0], edges]), np.concatenate([edges, [len(user)]])
    parts = np.zeros(len(user), np.int8)
    held_out = [2] * (not data.test) + [1] * (not data.valid)
    for back, part in enumerate(held_out, start=1):
        chosen = order[(end - back)[end - back > first]]
        parts[chosen] = part
    parts[user == MISSING_KEY] = 0
    return parts
