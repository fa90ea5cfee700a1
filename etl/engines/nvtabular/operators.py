"""NVTabular's operators where they are wrong by themselves, and those it lacks.

Results are frames of their own, with labels from 0 on: some of NVTabular's operators write into the frame they get.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from etl.engines.nvtabular.library import (
    Bucketize,
    ColumnSelector,
    LogOp,
    Normalize,
    Operator,
    encode_list_column,
    flatten_list_column_values,
)
from etl.engines.nvtabular.plan import Hash
from etl.engines.nvtabular.statistics import Ends, Off, Ordered, Stats, middle, moments, over_partitions
from etl.transform import MISSING_KEY, Packed, Transform


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
        super().__init__(dict.fromkeys(names, middle))

    def value(self, name: str) -> float | None:
        """The median of a column, if it has numbers."""
        middle = self.found[name]
        return middle[0] / 2 + middle[1] / 2 if middle else None

    def transform(self, col_selector: ColumnSelector, transformable: Any) -> Any:
        """The columns, filled, in a frame of their own."""
        return _filled(transformable, {name: self.value(name) or 0.0 for name in col_selector.names})


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
        return over_partitions(ddf, list(near), part=Off(near), whole=moments)

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


def _filled(frame: Any, values: Mapping[str, float]) -> Any:
    return type(frame)({name: frame[name].fillna(value) for name, value in values.items()}).reset_index(drop=True)


def _frame(like: Any, columns: Mapping[str, Any]) -> Any:
    """A frame of the same library, with labels from 0 on."""
    return type(like)(dict(columns))
