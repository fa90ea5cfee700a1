"""Statistics of columns of numbers over all partitions, the same for any division into partitions.

A pass that needs another pass's result is an operator of its own: the two would otherwise keep every partition in
memory.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from etl.engines.nvtabular.library import ColumnSelector, StatOperator, delayed

Float64s = npt.NDArray[np.float64]
Stats = Mapping[str, Any]


class _Statistics(StatOperator):
    """Learns one thing a column and passes the columns on as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Any] = {}

    def fit_finalize(self, dask_stats: Stats) -> None:
        """Keeps what the workers found."""
        self.found = dict(dask_stats)

    def clear(self) -> None:
        """Forgets it."""
        self.found = {}


class Ends(_Statistics):
    """Count, mean, lowest and highest number of each column; 0 where it has none. NaN is null."""

    def fit(self, col_selector: ColumnSelector, ddf: Any) -> Any:
        """One pass."""
        return over_partitions(ddf, col_selector.names, part=_ends_of_part, whole=_ends)


class Ordered(_Statistics):
    """The numbers at some ranks of the sorted column, by exact sorting: a whole column has to fit a worker's memory.

    `ranks` says which, from 0, when the count of numbers is known. NVTabular's own medians depend on the partitions.
    """

    def __init__(self, ranks: Mapping[str, Callable[[int], Sequence[int]]]) -> None:
        super().__init__()
        self._ranks = ranks

    def fit(self, col_selector: ColumnSelector, ddf: Any) -> Any:
        """One pass a column."""
        parts = ddf.to_delayed()
        columns = {name: [delayed(_numbers)(part, name) for part in parts] for name in col_selector.names}
        return delayed(dict)({name: delayed(_ordered)(column, self._ranks[name]) for name, column in columns.items()})

    def edges(self, name: str) -> list[float]:
        """The numbers at the ranks, each once; 0 where the column has none."""
        return sorted(set(self.found[name])) or [0.0]


class Quantiles:
    """The ranks of the inner edges of buckets at equal shares of the rows."""

    def __init__(self, buckets: int) -> None:
        self._buckets = buckets

    def __call__(self, count: int) -> list[int]:
        """Rank i (n - 1) / buckets, rounded down, of each inner edge i."""
        return [at * (count - 1) // self._buckets for at in range(1, self._buckets)]


def middle(count: int) -> list[int]:
    """The ranks of the two numbers in the middle, which are one where the count is odd."""
    return [(count - 1) // 2, count // 2]


def over_partitions(ddf: Any, names: Sequence[str], *, part: Callable[..., Any], whole: Callable[..., Any]) -> Any:
    """By column, what `whole` makes of what `part` makes of each partition's numbers."""
    parts = [delayed(_by_column)(frame, names=list(names), part=part) for frame in ddf.to_delayed()]
    return delayed(_wholes)(parts, names=list(names), whole=whole)


def _by_column(frame: Any, *, names: Sequence[str], part: Callable[[str, Float64s], Any]) -> dict[str, Any]:
    return {name: part(name, _numbers(frame, name)) for name in names}


def _wholes(parts: Sequence[Stats], *, names: Sequence[str], whole: Callable[[list[Any]], Any]) -> Stats:
    return {name: whole([part[name] for part in parts]) for name in names}


def _numbers(frame: Any, name: str) -> Float64s:
    """The numbers of a column, without nulls, on the host; -0 is 0."""
    numbers: Float64s = frame[name].dropna().to_numpy() + 0.0
    return numbers


def _ends_of_part(name: str, numbers: Float64s) -> tuple[int, float, float, float]:
    if not len(numbers):
        return 0, 0.0, math.inf, -math.inf
    with np.errstate(over="ignore"):
        return len(numbers), float(numbers.sum()), float(numbers.min()), float(numbers.max())


def _ends(parts: Sequence[tuple[int, float, float, float]]) -> Stats:
    counts, sums, lows, highs = zip(*parts, strict=True)
    count, low, high = sum(counts), min(lows), max(highs)
    if not count:
        return {"count": 0, "mean": 0.0, "low": 0.0, "high": 0.0}
    return {"count": count, "mean": low if low == high else _sum(sums) / count, "low": low, "high": high}


class Off:
    """Sums of a column's distances from a number near its mean, and of their squares."""

    def __init__(self, near: Mapping[str, float]) -> None:
        self._near = near

    def __call__(self, name: str, numbers: Float64s) -> tuple[int, float, float]:
        """Count, sum of distances and sum of their squares."""
        with np.errstate(over="ignore", invalid="ignore"):
            off = numbers - self._near[name]
            return len(off), float(off.sum()), float((off * off).sum())


def moments(parts: Sequence[tuple[int, float, float]]) -> tuple[float, float]:
    """Mean distance and mean squared distance, of what `Off` found in the partitions."""
    counts, sums, squares = zip(*parts, strict=True)
    return _sum(sums) / sum(counts), _sum(squares) / sum(counts)


def _sum(numbers: Sequence[float]) -> float:
    """The parts' sum rounded once, or infinity where it leaves the range of float64."""
    try:
        return math.fsum(numbers) if all(map(math.isfinite, numbers)) else math.inf
    except OverflowError:
        return math.inf


def _ordered(parts: Sequence[Float64s], ranks: Callable[[int], Sequence[int]]) -> list[float]:
    numbers = np.sort(np.concatenate(parts))
    return [float(numbers[rank]) for rank in ranks(len(numbers))] if len(numbers) else []
