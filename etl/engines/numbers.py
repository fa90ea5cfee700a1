"""Fits numeric features on the staged training rows: fill, scale and bucket edges. NaN is missing."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from etl.artifact import Json
from etl.engines.order import Float64s, Reader, order_statistics
from etl.faults import Fault
from etl.spec import Numeric, column_of
from etl.transform import scale

_X = pl.col("x")


@dataclass(frozen=True)
class _Seen:
    """What a pass over a column finds: numbers and nulls, and the numbers' mean and ends, 0 where there are none."""

    count: int
    nulls: int
    mean: float
    low: float
    high: float


def fit_scale(feature: Numeric, train: Path) -> Json:
    """The step that fills, clips, takes the logarithm and scales, in this order.

    Raises:
        Fault: no value to fill by, or numbers whose moments leave the range of float64.
    """
    rows = _column(feature, train)
    seen = _seen(rows)
    if not seen.count and isinstance(feature.fill, str):
        raise _empty(feature)
    clip = list(feature.clip) if feature.clip else None
    step: Json = {"name": str(feature.name), "column": column_of(feature), "fill": _fill(feature, seen, train=train)}
    step |= {"clip": clip, "log1p": feature.log1p, "mean": 0.0, "std": 1.0}
    ends = [seen.low, seen.high] * (seen.count > 0) + [step["fill"]] * (seen.nulls > 0)
    low, high = scale(np.array([min(ends), max(ends)]), step).tolist()
    if feature.scale == "minmax" or (feature.scale == "standardize" and low == high):
        step |= {"mean": low, "std": (high - low) or 1.0}
    elif feature.scale == "standardize":
        step |= _moments(feature, rows, step=step, seen=seen)
    if not all(math.isfinite(step[name]) for name in ("fill", "mean", "std")):
        got, remedy = "numbers too large for their mean and deviation", "set 'clip' and 'fill', or scale = \"none\""
        raise Fault(f"features.{feature.name}", got=got, wanted="moments within float64", remedy=remedy)
    return step


def fit_boundaries(feature: Numeric, train: Path) -> list[float]:
    """Inner edges of `quantiles` buckets, repeated ones once: edge i has rank floor(i (n - 1) / quantiles), from 0.

    That is numpy's method "lower" in exact arithmetic, so each edge is a number of the column.
    """
    count = _seen(_column(feature, train)).count
    if not count:
        raise _empty(feature)
    buckets = feature.quantiles or 2
    ranks = [at * (count - 1) // buckets for at in range(1, buckets)]
    return sorted(set(order_statistics(_reader(feature, train), ranks, count=count)))


def _column(feature: Numeric, train: Path) -> pl.LazyFrame:
    return pl.scan_parquet(train).select(x=pl.col(column_of(feature)).cast(pl.Float64).fill_nan(None))


def _seen(rows: pl.LazyFrame) -> _Seen:
    count, nulls, *rest = _one(rows, _X.count(), _X.null_count(), _X.mean(), _X.min(), _X.max())
    mean, low, high = rest if count else (0.0, 0.0, 0.0)
    return _Seen(int(count), int(nulls), mean=mean, low=low, high=high)


def _fill(feature: Numeric, seen: _Seen, *, train: Path) -> float:
    if not isinstance(feature.fill, str):
        return float(feature.fill)
    if feature.fill == "mean":
        return seen.low if seen.low == seen.high else seen.mean
    middle = [(seen.count - 1) // 2, seen.count // 2]
    low, high = order_statistics(_reader(feature, train), middle, count=seen.count)
    return low / 2 + high / 2


def _moments(feature: Numeric, rows: pl.LazyFrame, *, step: Json, seen: _Seen) -> Json:
    """Mean and deviation from a pass that starts near the mean: sums of large numbers lose what sets them apart."""
    near = float(scale(np.array([seen.mean]), step)[0])
    x = _X.fill_null(step["fill"])
    x = x.clip(*step["clip"]) if step["clip"] else x
    x = x.clip(0.0, None).log1p() if step["log1p"] else x
    raw, off = _X - seen.mean, x - near
    late, shift, square = _one(rows, raw.mean(), off.mean(), (off * off).mean())
    found = {"mean": near + shift, "std": math.sqrt(max(square - shift * shift, 0.0)) or 1.0}
    return found | ({"fill": seen.mean + late} if feature.fill == "mean" else {})


def _one(rows: pl.LazyFrame, *aggregates: pl.Expr) -> tuple[float, ...]:
    named = [aggregate.alias(str(at)) for at, aggregate in enumerate(aggregates)]
    return rows.select(named).collect().row(0)


def _reader(feature: Numeric, train: Path) -> Reader:
    def read() -> Iterator[Float64s]:
        for batch in pq.ParquetFile(train).iter_batches(columns=[column_of(feature)], batch_size=1 << 20):
            numbers = batch.column(0).drop_null().cast(pa.float64(), safe=False).to_numpy()
            yield numbers[~np.isnan(numbers)]

    return read


def _empty(feature: Numeric) -> Fault:
    return Fault(
        f"features.{feature.name}",
        got="no value in the training rows",
        wanted="at least one",
        remedy="drop the feature or give fill",
    )
