"""The CPU engine: fits the transform's state with polars' streaming engine, one narrow query a column."""

from pathlib import Path

import numpy as np
import polars as pl

from etl.artifact import Json
from etl.faults import Fault
from etl.schema import IdFeature, Table
from etl.spec import Categorical, Cross, FeatureSpec, Numeric, column_of, resolve
from etl.transform import MISSING_KEY, text_keys


def fit(spec: FeatureSpec, train: Path, *, transform: Path) -> tuple[Json, list[IdFeature], list[Table]]:
    """Fits on the staged training rows; writes the vocabularies into `transform` and returns the rest as JSON values.

    Raises:
        Fault: a column without any value, or two texts with one 64-bit key.
    """
    rows = pl.scan_parquet(train)
    (transform / "vocabulary").mkdir(parents=True)
    ids, dense, features, tables = [], [], [], []
    for feature in resolve(spec.features):
        if isinstance(feature, Numeric) and feature.as_ == "dense":
            dense.append(_dense(feature, rows))
            continue
        step, size = _id_step(feature, rows, transform=transform)
        ids.append(step)
        kind = "buckets" if isinstance(feature, Numeric) else feature.type
        features.append(IdFeature(name=step["name"], type=kind, table=step["name"], linear_only=feature.linear_only))
        tables.append(Table(name=step["name"], rows=size))
    return {"version": 1, "signature": _signature(spec), "features": ids, "dense": dense}, features, tables


def _signature(spec: FeatureSpec) -> Json:
    """The raw columns and which of them travel as keys and as numbers."""
    resolved = [feature for feature in resolve(spec.features) if not isinstance(feature, Cross)]
    return {
        "columns": spec.raw_columns(),
        "keys": list(dict.fromkeys(column_of(f) for f in resolved if isinstance(f, Categorical))),
        "numbers": list(dict.fromkeys(column_of(f) for f in resolved if isinstance(f, Numeric))),
    }


def _id_step(feature: Categorical | Numeric | Cross, rows: pl.LazyFrame, *, transform: Path) -> tuple[Json, int]:
    """The step of one id feature and the rows of its table."""
    name = str(feature.name)
    if isinstance(feature, Cross):
        step = {"name": name, "kind": "cross", "inputs": list(feature.inputs), "rows": feature.hash_rows}
        return step, feature.hash_rows
    column = column_of(feature)
    if isinstance(feature, Numeric):
        boundaries = feature.boundaries or _quantiles(feature, rows)
        return {"name": name, "kind": "buckets", "column": column, "boundaries": boundaries}, len(boundaries) + 2
    if feature.hash_rows:
        step = {"name": name, "kind": "hash", "column": column, "rows": feature.hash_rows}
        return step, feature.hash_rows
    vocabulary = _vocabulary(feature, rows)
    vocabulary.write_parquet(transform / "vocabulary" / f"{name}.parquet")
    return {"name": name, "kind": "vocabulary", "column": column}, vocabulary.height + 1


def _vocabulary(feature: Categorical, rows: pl.LazyFrame) -> pl.DataFrame:
    """value, key, row, count: most frequent first, ties by value, rows from 1."""
    column = column_of(feature)
    counts = (
        rows.select(value=pl.col(column))
        .drop_nulls()
        .group_by("value")
        .agg(count=pl.len())
        .filter(pl.col("count") >= feature.min_count)
        .sort("count", "value", descending=[True, False])
        .collect(engine="streaming")
    )
    counts = counts.head(feature.max_rows - 1) if feature.max_rows else counts
    value = counts["value"]
    keys = value.to_numpy() if feature.dtype == "int64" else text_keys(value.to_arrow())
    if len(np.unique(keys)) < len(keys) or MISSING_KEY in keys:
        place = f"features.{feature.name}"
        remedy = "set hash_rows for this feature, where collisions are expected"
        raise Fault(place, got="two values with one 64-bit key", wanted="a key a value", remedy=remedy)
    row = np.arange(1, len(keys) + 1, dtype=np.int64)
    return counts.select("value", key=pl.Series(keys, dtype=pl.Int64), row=pl.Series(row), count=pl.col("count"))


def _quantiles(feature: Numeric, rows: pl.LazyFrame) -> list[float]:
    """Inner edges at equal shares of the training rows, repeated ones once."""
    count = feature.quantiles or 2
    edges = [pl.col(column_of(feature)).cast(pl.Float64).quantile(i / count).alias(str(i)) for i in range(1, count)]
    found = rows.select(edges).collect(engine="streaming").row(0)
    if None in found:
        raise _empty(feature)
    return sorted(set(found))


def _dense(feature: Numeric, rows: pl.LazyFrame) -> Json:
    """Fill, clip, log1p, mean and deviation; the moments in two passes, since one loses large means."""
    raw = rows.select(x=pl.col(column_of(feature)).cast(pl.Float64))
    fill = feature.fill if feature.fill != "mean" else raw.select(pl.col("x").mean()).collect(engine="streaming").item()
    if fill is None:
        raise _empty(feature)
    clip = list(feature.clip) if feature.clip else None
    x = pl.col("x").fill_null(fill)
    x = x.clip(*clip) if clip else x
    x = x.clip(0.0, None).log1p() if feature.log1p else x
    mean, std = 0.0, 1.0
    if feature.standardize:
        mean = float(raw.select(x.mean()).collect(engine="streaming").item())
        std = float(raw.select(((x - mean) ** 2).mean().sqrt()).collect(engine="streaming").item()) or 1.0
    step = {"name": str(feature.name), "column": column_of(feature), "fill": float(fill), "clip": clip}
    return step | {"log1p": feature.log1p, "mean": mean, "std": std}


def _empty(feature: Numeric) -> Fault:
    place = f"features.{feature.name}"
    return Fault(
        place, got="no value in the training rows", wanted="at least one", remedy="drop the feature or give fill"
    )
