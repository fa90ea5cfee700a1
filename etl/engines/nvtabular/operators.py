"""NVTabular's operators where they are wrong by themselves, and those it lacks.

Statistics are exact and the same for any division into partitions. A pass that needs another pass's result is an
operator of its own: the two would otherwise keep every partition in memory. Results have labels from 0 on.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from etl.engines.nvtabular.library import (
    Bucketize,
    ColumnSelector,
    LogOp,
    Normalize,
    Operator,
    StatOperator,
    delayed,
    encode_list_column,
    flatten_list_column_values,
)
from etl.engines.nvtabular.plan import Hash
from etl.transform import MISSING_KEY, Packed, Transform

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
    """Count, nulls, mean, lowest and highest number of each column: NaN is null, and 0 stands where there is none."""

    def fit(self, col_selector: ColumnSelector, ddf: Any) -> Any:
        """One pass."""
        return _over_partitions(ddf, col_selector.names, part=_ends_of_part, whole=_ends)


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


class FillMean(Ends):
    """FillMissing by the mean of the rows that have a number, which NVTabular has no operator for."""

    def value(self, name: str) -> float | None:
        """The mean of a column, if it has numbers."""
        return float(self.found[name]["mean"]) if self.found[name]["count"] else None

    def transform(self, col_selector: ColumnSelector, transformable: Any) -> Any:
        """The columns, filled, in a frame of their own."""
        return _filled(transformable, {name: self.value(name) or 0.0 for name in col_selector.names})


class FillMiddle(Ordered):
    """FillMedian, exact: the mean of the two numbers in the middle."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(dict.fromkeys(names, _middle))

    def value(self, name: str) -> float | None:
        """The median of a column, if it has numbers."""
        middle = self.found[name]
        return middle[0] / 2 + middle[1] / 2 if middle else None

    def transform(self, col_selector: ColumnSelector, transformable: Any) -> Any:
        """The columns, filled, in a frame of their own."""
        return _filled(transformable, {name: self.value(name) or 0.0 for name in col_selector.names})


class Quantiles:
    """The ranks of the inner edges of buckets at equal shares of the rows."""

    def __init__(self, buckets: int) -> None:
        self._buckets = buckets

    def __call__(self, count: int) -> list[int]:
        """Rank i (n - 1) / buckets, rounded down, of each inner edge i."""
        return [at * (count - 1) // self._buckets for at in range(1, self._buckets)]


class Log1p(LogOp):
    """log(1 + x) in float64, of 0 where x is below; LogOp rounds to float32 first and adds 1 afterwards."""

    def transform(self, col_selector: ColumnSelector, df: Any) -> Any:
        """The logarithms."""
        return _frame(df, {name: np.log1p(np.maximum(df[name].to_numpy(), 0.0)) for name in col_selector.names})

    @property
    def output_dtype(self) -> Any:
        """float64."""
        return np.float64


class Scale(Normalize):
    """Normalize with moments from a pass that starts near the mean, and the deviation of the rows, not of a sample.

    Normalize subtracts the square of a sum from a sum of squares, which for epoch seconds leaves nothing. `ends` is
    fitted before. `how` maps a column to "standardize" or "minmax".
    """

    def __init__(self, ends: Ends, how: Mapping[str, str]) -> None:
        super().__init__(out_dtype=np.float64)
        self._ends, self._how = ends, how

    def fit(self, col_selector: ColumnSelector, ddf: Any) -> Any:
        """One pass over the columns whose numbers differ."""
        near = {name: self._ends.found[name]["mean"] for name in col_selector.names if self._differs(name)}
        return _over_partitions(ddf, list(near), part=_Off(near), whole=_moments)

    def fit_finalize(self, dask_stats: Stats) -> None:
        """Mean and deviation, or lowest number and range."""
        for name, how in self._how.items():
            low, high = (self._ends.found[name][end] for end in ("low", "high"))
            if how == "minmax" or low == high:
                self.means[name], self.stds[name] = low, (high - low) or 1.0
                continue
            shift, square = dask_stats[name]
            self.means[name] = self._ends.found[name]["mean"] + shift
            self.stds[name] = math.sqrt(max(square - shift * shift, 0.0)) or 1.0

    def _differs(self, name: str) -> bool:
        found = self._ends.found[name]
        return self._how[name] == "standardize" and bool(found["low"] != found["high"])


class Buckets(Bucketize):
    """Bucketize whose rows start at 1, so that 0 is left for missing numbers; Bucketize puts them into the top."""

    def transform(self, col_selector: ColumnSelector, df: Any) -> Any:
        """The rows."""
        numbers = df[col_selector.names].reset_index(drop=True)
        buckets = super().transform(col_selector, numbers.fillna(0.0))
        return _frame(
            df,
            {
                name: np.where(numbers[name].isna().to_numpy(), 0, buckets[name].to_numpy() + 1)
                for name in col_selector.names
            },
        )

    @property
    def output_dtype(self) -> Any:
        """int64."""
        return np.int64


class Hashed(Operator):
    """Hashes and crosses by the served transform itself, on the host.

    HashBucket and HashedCross take the row's label into the hash, know no missing value, and differ between pandas and
    cuDF. `hashes` read key columns, or rows of buckets.
    """

    def __init__(self, hashes: Sequence[Hash], *, buckets: Sequence[str]) -> None:
        super().__init__()
        self._hashes, self._buckets = tuple(hashes), frozenset(buckets)

    def column_mapping(self, col_selector: ColumnSelector) -> dict[str, list[str]]:
        """Each feature's column and the columns that it reads."""
        return {made.name: list(made.inputs) for made in self._hashes}

    def transform(self, col_selector: ColumnSelector, transformable: Any) -> Any:
        """The rows of each table, 0 where a part is missing."""
        return _frame(transformable, {made.name: self._rows(made, transformable) for made in self._hashes})

    def _rows(self, made: Hash, frame: Any) -> Any:
        column = frame[made.inputs[0]]
        if not made.crossed and not _is_number(column):
            rows = _hashed([flatten_list_column_values(column).to_numpy()], made)
            return encode_list_column(column, rows, dtype=np.int64)
        return _hashed([self._keys(name, frame) for name in made.inputs], made)

    def _keys(self, name: str, frame: Any) -> npt.NDArray[np.int64]:
        keys: npt.NDArray[np.int64] = frame[name].to_numpy()
        return np.where(keys == 0, MISSING_KEY, keys - 1) if name in self._buckets else keys

    @property
    def output_dtype(self) -> Any:
        """int64."""
        return np.int64


def _is_number(column: Any) -> bool:
    return str(column.dtype) == "int64"


def _hashed(parts: Sequence[npt.NDArray[np.int64]], made: Hash) -> npt.NDArray[np.int64]:
    """Rows of one hash [B] by the transform that is served."""
    names = [str(at) for at in range(len(parts))]
    steps = [{"name": name, "kind": "hash", "column": name, "rows": made.rows} for name in names]
    cross = {"name": "cross", "kind": "cross", "inputs": names, "rows": made.rows}
    signature = {"columns": dict.fromkeys(names, "int64"), "keys": names, "numbers": [], "slots": {}, "newest": []}
    state = {"signature": signature, "features": [*steps, cross] if made.crossed else steps, "dense": []}
    packed = Packed(np.stack(parts, axis=1), np.empty((len(parts[0]), 0)))
    return Transform(state, {}).apply(packed).ids[:, -1]


def _middle(count: int) -> list[int]:
    return [(count - 1) // 2, count // 2]


def _filled(frame: Any, values: Mapping[str, float]) -> Any:
    return type(frame)({name: frame[name].fillna(value) for name, value in values.items()}).reset_index(drop=True)


def _frame(like: Any, columns: Mapping[str, Any]) -> Any:
    """A frame of the same library, with labels from 0 on."""
    return type(like)(dict(columns))


def _over_partitions(ddf: Any, names: Sequence[str], *, part: Callable[..., Any], whole: Callable[..., Any]) -> Any:
    """By column, what `whole` makes of what `part` makes of each partition's numbers."""
    parts = [delayed(_by_column)(frame, list(names), part) for frame in ddf.to_delayed()]
    return delayed(_wholes)(parts, list(names), whole)


def _by_column(frame: Any, names: Sequence[str], part: Callable[[str, Float64s, int], Any]) -> dict[str, Any]:
    return {name: part(name, _numbers(frame, name), int(frame[name].isna().sum())) for name in names}


def _wholes(parts: Sequence[Mapping[str, Any]], names: Sequence[str], whole: Callable[[list[Any]], Any]) -> Stats:
    return {name: whole([part[name] for part in parts]) for name in names}


def _numbers(frame: Any, name: str) -> Float64s:
    """The numbers of a column, without nulls, on the host."""
    numbers: Float64s = frame[name].dropna().to_numpy()
    return numbers


def _ends_of_part(name: str, numbers: Float64s, nulls: int) -> tuple[int, int, float, float, float]:
    if not len(numbers):
        return 0, nulls, 0.0, math.inf, -math.inf
    with np.errstate(over="ignore"):
        return len(numbers), nulls, float(numbers.sum()), float(numbers.min()), float(numbers.max())


def _ends(parts: Sequence[tuple[int, int, float, float, float]]) -> Stats:
    counts, nulls, sums, lows, highs = zip(*parts, strict=True)
    count = sum(counts)
    if not count:
        return {"count": 0, "nulls": sum(nulls), "mean": 0.0, "low": 0.0, "high": 0.0}
    low, high = min(lows), max(highs)
    mean = low if low == high else _sum(sums) / count
    return {"count": count, "nulls": sum(nulls), "mean": mean, "low": low, "high": high}


class _Off:
    """Sums of a column's distances from a number near its mean, and of their squares."""

    def __init__(self, near: Mapping[str, float]) -> None:
        self._near = near

    def __call__(self, name: str, numbers: Float64s, nulls: int) -> tuple[int, float, float]:
        with np.errstate(over="ignore", invalid="ignore"):
            off = numbers - self._near[name]
            return len(off), float(off.sum()), float((off * off).sum())


def _moments(parts: Sequence[tuple[int, float, float]]) -> tuple[float, float]:
    counts, sums, squares = zip(*parts, strict=True)
    return _sum(sums) / sum(counts), _sum(squares) / sum(counts)


def _sum(numbers: Sequence[float]) -> float:
    """Exact, or infinite where a part is."""
    return math.fsum(numbers) if all(map(math.isfinite, numbers)) else math.inf


def _ordered(parts: Sequence[Float64s], ranks: Callable[[int], Sequence[int]]) -> list[float]:
    numbers = np.concatenate(parts)
    at = ranks(len(numbers)) if len(numbers) else []
    return [float(number) for number in np.sort(numbers)[list(at)]] if len(at) else []
