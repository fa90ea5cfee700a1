"""The CPU engine: fits the transform's state with polars' streaming engine, one narrow query a column."""

from pathlib import Path

import numpy as np
import polars as pl

from etl.artifact import Json
from etl.faults import Fault
from etl.pack import text_keys
from etl.schema import IdFeature, Table
from etl.spec import Bag, Categorical, Cross, FeatureSpec, Numeric, Sequence, column_of, resolve, table_of
from etl.transform import RESERVED_KEYS

Looked = Categorical | Bag | Sequence


def fit(spec: FeatureSpec, train: Path, *, transform: Path) -> tuple[Json, list[IdFeature], list[Table]]:
    """Fits on the staged training rows; writes the vocabularies into `transform` and returns the rest as JSON values.

    Raises:
        Fault: a column without any value, or two texts with one 64-bit key.
    """
    rows = pl.scan_parquet(train)
    (transform / "vocabulary").mkdir(parents=True)
    tables = {
        table: _table(table, users, rows=rows, transform=transform) for table, users in spec.shared_tables().items()
    }
    ids: list[Json] = []
    dense: list[Json] = []
    features: list[IdFeature] = []
    for feature in resolve(spec.features):
        if isinstance(feature, Numeric) and feature.as_ == "dense":
            dense.append(_scale(feature, rows))
            continue
        step, own_rows = _id_step(feature, rows)
        ids.append(step)
        features.append(_described(feature, step))
        if own_rows:
            tables[features[-1].table] = own_rows
    sized = [Table(name=name, rows=size) for name, size in tables.items()]
    return {"version": 1, "signature": _signature(spec), "features": ids, "dense": dense}, features, sized


def _described(feature: Looked | Numeric | Cross, step: Json) -> IdFeature:
    """The feature as later stages see it."""
    described = IdFeature(
        name=step["name"],
        type=feature.as_ if isinstance(feature, Numeric) else feature.type,
        table=step["table"],
        linear_only=feature.linear_only,
        weighted=step["kind"] == "field" or bool(step.get("weights")),
    )
    if not isinstance(feature, Bag | Sequence):
        return described
    lists = {"slots": feature.max_length, "combiner": feature.combiner, "dtype": "list<int64>"}
    return described.model_copy(update=lists)


def _signature(spec: FeatureSpec) -> Json:
    """The raw columns and which of them travel as keys and as numbers."""
    resolved = [feature for feature in resolve(spec.features) if not isinstance(feature, Cross)]
    weights = [f.weight_column for f in resolved if isinstance(f, Bag) and f.weight_column]
    return {
        "columns": spec.raw_columns(),
        "keys": list(dict.fromkeys(column_of(f) for f in resolved if not isinstance(f, Numeric))),
        "numbers": list(dict.fromkeys([*(column_of(f) for f in resolved if isinstance(f, Numeric)), *weights])),
        "slots": spec.slots(),
        "newest": list(dict.fromkeys(column_of(f) for f in resolved if isinstance(f, Sequence))),
    }


def _id_step(feature: Looked | Numeric | Cross, rows: pl.LazyFrame) -> tuple[Json, int]:
    """The step of one id feature, and the rows of its table where that is its own (0: a vocabulary or a hash)."""
    name = str(feature.name)
    if isinstance(feature, Cross):
        step = {"name": name, "kind": "cross", "table": name, "inputs": list(feature.inputs), "rows": feature.hash_rows}
        return step, feature.hash_rows
    if isinstance(feature, Numeric) and feature.as_ == "field":
        return _scale(feature, rows) | {"kind": "field", "table": name}, 2
    column = column_of(feature)
    if isinstance(feature, Numeric):
        boundaries = feature.boundaries or _quantiles(feature, rows)
        step = {"name": name, "kind": "buckets", "table": name, "column": column, "boundaries": boundaries}
        return step, len(boundaries) + 2
    weights = feature.weight_column if isinstance(feature, Bag) else None
    step = {"name": name, "table": table_of(feature), "column": column, "weights": weights}
    if feature.hash_rows:
        return step | {"kind": "hash", "rows": feature.hash_rows}, 0
    return step | {"kind": "vocabulary"}, 0


def _table(name: str, users: list[Looked], *, rows: pl.LazyFrame, transform: Path) -> int:
    """Rows of a table that features look up; writes its vocabulary, if it has one."""
    if users[0].hash_rows:
        return users[0].hash_rows
    vocabulary = _vocabulary(name, users, rows=rows)
    vocabulary.write_parquet(transform / "vocabulary" / f"{name}.parquet")
    return vocabulary.height + 1


def _vocabulary(name: str, users: list[Looked], *, rows: pl.LazyFrame) -> pl.DataFrame:
    """value, key, row, count: most frequent first over all columns that share the table, ties by value, rows from 1."""
    rules = users[0]
    columns = {column_of(user): isinstance(user, Bag | Sequence) for user in users}
    values = [
        rows.select(value=pl.col(column).explode(empty_as_null=True) if listed else pl.col(column))
        for column, listed in columns.items()
    ]
    counts = (
        pl.concat(values)
        .drop_nulls()
        .group_by("value")
        .agg(count=pl.len())
        .filter(pl.col("count") >= rules.min_count)
        .sort("count", "value", descending=[True, False])
        .collect(engine="streaming")
    )
    counts = counts.head(rules.max_rows - 1) if rules.max_rows else counts
    value = counts["value"]
    keys = value.to_numpy() if rules.dtype == "int64" else text_keys(value.to_arrow())
    if len(np.unique(keys)) < len(keys) or np.isin(keys, RESERVED_KEYS).any():
        remedy = "set hash_rows for this feature, where collisions are expected"
        raise Fault(f"features.{name}", got="two values with one 64-bit key", wanted="a key a value", remedy=remedy)
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


def _scale(feature: Numeric, rows: pl.LazyFrame) -> Json:
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
