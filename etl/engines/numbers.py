"""Fits numeric features on the typed training rows: fill, scale and bucket edges. NaN is missing.

Sums are taken over chunks of a fixed number of rows and then over the chunks, so the way in which rows lie in files,
and the number of threads, change no digit.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from etl.artifact import Json
from etl.engines.order import Float64s, Reader, order_statistics
from etl.engines.scaling import scale
from etl.faults import Fault
from etl.spec import Numeric, column_of
from etl.transform import as_columns
from etl.typed import Columns

_CHUNK = 1 << 16


@dataclass(frozen=True)
class _Moments:
    """Of numbers: how many, their mean, deviation and ends; 0 where there are none."""

    count: int
    mean: float
    std: float
    low: float
    high: float


def fit_scale(feature: Numeric, train: Columns) -> Json:
    """The step that fills, clips, takes the logarithm and scales, in this order.

    Raises:
        Fault: no value to fill by, or numbers whose moments leave the range of float64.
    """
    step: Json = {"name": str(feature.name), "column": column_of(feature), "fill": _fill(feature, train)}
    step |= {"clip": list(feature.clip) if feature.clip else None, "log1p": feature.log1p, "mean": 0.0, "std": 1.0}
    if feature.scale != "none":
        found = _moments(_scaled(_chunks(feature, train), step))
        if feature.scale == "minmax" or found.low == found.high:
            step |= {"mean": found.low, "std": (found.high - found.low) or 1.0}
        else:
            step |= {"mean": found.mean, "std": found.std or 1.0}
    if not all(math.isfinite(step[name]) for name in ("fill", "mean", "std")):
        got, remedy = "numbers too large for their mean and deviation", "set 'clip' and 'fill', or scale = \"none\""
        raise Fault(f"features.{feature.name}", got=got, wanted="moments within float64", remedy=remedy)
    return step


def fit_boundaries(feature: Numeric, train: Columns) -> list[float]:
    """Inner edges of `quantiles` buckets, repeated ones once: edge i has rank floor(i (n - 1) / quantiles), from 0.

    That is numpy's method "lower" in exact arithmetic, so each edge is a number of the column.
    """
    read, count = _counted(feature, train)
    buckets = feature.quantiles or 2
    ranks = [at * (count - 1) // buckets for at in range(1, buckets)]
    return sorted(set(order_statistics(read, ranks, count=count)))


def _fill(feature: Numeric, train: Columns) -> float:
    if not isinstance(feature.fill, str):
        return float(feature.fill)
    read, count = _counted(feature, train)
    if feature.fill == "mean":
        found = _moments(read())
        return found.low if found.low == found.high else found.mean
    low, high = order_statistics(read, [(count - 1) // 2, count // 2], count=count)
    return low / 2 + high / 2


def _moments(chunks: Iterable[Float64s]) -> _Moments:
    """From the moments of each chunk (Chan, Golub and LeVeque 1983): large numbers keep what sets them apart."""
    found = []
    with np.errstate(all="ignore"):  # what leaves the range of float64 ends in a mean that does
        for x in chunks:
            if not len(x):
                continue
            mean = x.mean()
            off = x - mean
            shift = off.mean()
            found.append((len(x), mean + shift, (off * off).sum() - len(x) * shift**2, x.min(), x.max()))
        if not found:
            return _Moments(0, 0.0, 0.0, 0.0, 0.0)
        count, mean, square, low, high = np.array(found).T
        rows, near = count.sum(), mean[0]
        center = near + (count * (mean - near)).sum() / rows
        variance = (square.sum() + (count * (mean - center) ** 2).sum()) / rows
    return _Moments(int(rows), float(center), math.sqrt(max(variance, 0.0)), float(low.min()), float(high.max()))


def _scaled(chunks: Iterable[Float64s], step: Json) -> Iterator[Float64s]:
    """Each chunk scaled, in memory that the next one takes over."""
    steps, scaled = as_columns([step]), np.empty(_CHUNK)
    for chunk in chunks:
        own = scaled[: len(chunk)]
        scale(chunk[None], steps, into=own[None])
        yield own


def _chunks(feature: Numeric, train: Columns) -> Iterator[Float64s]:
    """The column in chunks of a fixed number of rows, NaN where a row has no number."""
    waiting = np.empty(0)
    for values in train.values(column_of(feature)):
        numbers = values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        waiting = np.concatenate([waiting, numbers]) if len(waiting) else numbers
        while len(waiting) >= _CHUNK:
            yield waiting[:_CHUNK]
            waiting = waiting[_CHUNK:]
    yield waiting


def _counted(feature: Numeric, train: Columns) -> tuple[Reader, int]:
    """The numbers of the column in batches, and how many there are. Raises Fault where there are none."""

    def read() -> Iterator[Float64s]:
        for chunk in _chunks(feature, train):
            yield chunk[~np.isnan(chunk)]

    count = sum(len(numbers) for numbers in read())
    if not count:
        got, remedy = "no value in the training rows", "drop the feature or give fill"
        raise Fault(f"features.{feature.name}", got=got, wanted="at least one", remedy=remedy)
    return read, count
