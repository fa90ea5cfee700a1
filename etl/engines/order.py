"""Exact order statistics of a column of any length, in bounded memory."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64s = npt.NDArray[np.float64]
UInt64s = npt.NDArray[np.uint64]

Reader = Callable[[], Iterable[Float64s]]
"""Reads a column anew, in batches."""

_SIGN = np.uint64(1 << 63)
_COUNTER_BITS = 22


def order_statistics(read: Reader, ranks: Sequence[int], *, count: int, in_memory: int = 1 << 21) -> list[float]:
    """The numbers at `ranks`, counted from 0 in ascending order, of the `count` numbers that `read` gives in batches.

    Each pass counts the numbers by their next bits, in an order in which bits ascend as the numbers do, and keeps the
    ranges that hold a rank; what is left is sorted once it has at most `in_memory` numbers. The batches and their
    order do not matter. NaN has no place in them.
    """
    ranges = _Ranges(np.zeros(1, np.uint64), 0, np.asarray(ranks, np.int64), np.zeros(len(ranks), np.int64))
    left = count
    while left > in_memory and ranges.bits < 64:
        ranges, left = _narrowed(ranges, read)
    if ranges.bits == 64:
        return _numbers(ranges.starts[ranges.at])
    kept = np.sort(np.concatenate([ranges.members(_ascending(batch)) for batch in read()]))
    first = np.searchsorted(kept, ranges.starts << np.uint64(64 - ranges.bits) if ranges.bits else ranges.starts)
    return _numbers(kept[first[ranges.at] + ranges.ranks])


@dataclass(frozen=True)
class _Ranges:
    """Ranges of numbers that share their first `bits`: `starts` ascend, and rank i is `ranks[i]` within `at[i]`."""

    starts: UInt64s
    bits: int
    ranks: npt.NDArray[np.int64]
    at: npt.NDArray[np.int64]

    def members(self, numbers: UInt64s) -> UInt64s:
        """Those of the numbers that lie in a range."""
        if not self.bits:
            return numbers
        heads = self.heads(numbers)
        inside: UInt64s = numbers[self.starts[self.of(heads)] == heads]
        return inside

    def heads(self, numbers: UInt64s) -> UInt64s:
        """The first bits of each number."""
        if not self.bits:
            return np.zeros_like(numbers)
        heads: UInt64s = numbers >> np.uint64(64 - self.bits)
        return heads

    def of(self, heads: UInt64s) -> npt.NDArray[np.int64]:
        """The range that begins with each head, if one does."""
        return np.minimum(np.searchsorted(self.starts, heads), len(self.starts) - 1)


def _narrowed(ranges: _Ranges, read: Reader) -> tuple[_Ranges, int]:
    """Ranges of some more bits that hold the same ranks, and how many numbers they hold."""
    size = len(ranges.starts)
    more = min(64 - ranges.bits, _COUNTER_BITS - (size - 1).bit_length())
    counts = np.zeros(size << more, np.int64)
    for batch in read():
        numbers = ranges.members(_ascending(batch))
        heads = ranges.heads(numbers)
        tails = (numbers >> np.uint64(64 - ranges.bits - more)).astype(np.int64) & ((1 << more) - 1)
        counts += np.bincount((ranges.of(heads) << more) + tails, minlength=len(counts))
    ends = np.cumsum(counts)
    before = np.append(0, ends)[ranges.at << more]
    cells = np.searchsorted(ends, before + ranges.ranks, side="right")
    kept, at = np.unique(cells, return_inverse=True)
    starts = (ranges.starts[kept >> more] << np.uint64(more)) | (kept & ((1 << more) - 1)).astype(np.uint64)
    within = before + ranges.ranks - (ends - counts)[cells]
    return _Ranges(starts, ranges.bits + more, within, at), int(counts[kept].sum())


def _ascending(numbers: Float64s) -> UInt64s:
    """The bits of each number, changed so that they ascend as the numbers do; -0 is 0."""
    bits = (numbers + 0.0).view(np.uint64)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def _numbers(bits: UInt64s) -> list[float]:
    """The numbers with these ascending bits."""
    return [float(number) for number in np.where(bits & _SIGN, bits ^ _SIGN, ~bits).view(np.float64)]
