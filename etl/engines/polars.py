"""The CPU engine: fits the transform's state column by column, several at once, with narrow queries of polars."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from etl.artifact import Json
from etl.engines.device import Device
from etl.engines.encodings import fit_encoding
from etl.engines.fitting import Fitting
from etl.engines.numbers import fit_boundaries, fit_scale
from etl.engines.vocabulary import Looked, fit_table
from etl.extend import Parent
from etl.schema import IdFeature, Table
from etl.spec import (
    Bag,
    Count,
    Cross,
    FeatureSpec,
    Numeric,
    Resolved,
    Sequence,
    Target,
    column_of,
    resolve,
    table_of,
)
from etl.threads import in_order
from etl.typed import Columns


def fit(
    spec: FeatureSpec,
    train: Columns,
    *,
    transform: Path,
    parent: Parent | None,
    device: Device,
    progress: Callable[[float], None],
) -> tuple[Json, list[IdFeature], list[Table]]:
    """Fits on the typed training rows; writes vocabularies and encodings into `transform`, the rest is JSON values.

    With a parent its rows count as well, and every row of its tables stays where it is.

    Raises:
        Fault: a column without any value, or two values with one 64-bit key.
    """
    transform.mkdir()
    fitting = Fitting(transform.parent, train=train, parent=parent, device=device)
    shared, encodings = spec.shared_tables(), {feature.name: feature for feature in spec.encodings()}

    def fitted(feature: Resolved) -> tuple[Json, IdFeature | None, int]:
        """The step; of an id feature how later stages see it, and the rows of a table of its own."""
        if isinstance(feature, Target | Count):
            return fit_encoding(encodings[feature.name], spec.tasks, fitting=fitting), None, 0
        if isinstance(feature, Numeric) and feature.as_ == "dense":
            return _scale(feature, fitting), None, 0
        step, own_rows = _id_step(feature, fitting)
        return step, _described(feature, step), own_rows

    jobs: list[Callable[[], Any]] = [partial(fitted, feature) for feature in resolve(spec.features)]
    features_end = len(jobs)  # numbers first: what counts keys may still be loading
    jobs += [partial(fit_table, table, shared[table], fitting=fitting) for table in shared]
    done: list[Any] = []
    for result in (in_order if device == "cpu" else map)(lambda job: job(), jobs):
        done.append(result)
        progress(len(done) / len(jobs))
    tables = dict(zip(shared, done[features_end:], strict=True))
    dense: list[Json] = []
    ids: list[Json] = []
    features: list[IdFeature] = []
    for step, described, own_rows in done[:features_end]:
        if described is None:
            dense.append(step)
            continue
        ids.append(step)
        features.append(described)
        if own_rows:
            tables[described.table] = own_rows
    rows = [Table(name=name, rows=size) for name, size in tables.items()]
    return {"version": 1, "signature": _signature(spec), "features": ids, "dense": dense}, features, rows


def _scale(feature: Numeric, fitting: Fitting) -> Json:
    """How a number is filled and scaled; the parent's way unless its numbers are to be fitted anew."""
    parent = fitting.parent
    kept = parent.step(str(feature.name)) if parent and not parent.refit_numbers else None
    return kept or fit_scale(feature, fitting.train)


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
    resolved = [f for f in resolve(spec.features) if not isinstance(f, Cross | Target | Count)]
    weights = [f.weight_column for f in resolved if isinstance(f, Bag) and f.weight_column]
    encoded = [column for feature in spec.encodings() for column in feature.by]
    return {
        "columns": spec.raw_columns(),
        "keys": list(dict.fromkeys([*(column_of(f) for f in resolved if not isinstance(f, Numeric)), *encoded])),
        "numbers": list(dict.fromkeys([*(column_of(f) for f in resolved if isinstance(f, Numeric)), *weights])),
        "slots": spec.slots(),
        "newest": list(dict.fromkeys(column_of(f) for f in resolved if isinstance(f, Sequence))),
    }


def _id_step(feature: Looked | Numeric | Cross, fitting: Fitting) -> tuple[Json, int]:
    """The step of one id feature, and the rows of its table where that is its own (0: a vocabulary or a hash)."""
    name = str(feature.name)
    if isinstance(feature, Cross):
        step = {"name": name, "kind": "cross", "table": name, "inputs": list(feature.inputs), "rows": feature.hash_rows}
        return step, feature.hash_rows
    if isinstance(feature, Numeric) and feature.as_ == "field":
        return _scale(feature, fitting) | {"kind": "field", "table": name}, 2
    column = column_of(feature)
    if isinstance(feature, Numeric):
        old = fitting.parent.step(name)["boundaries"] if fitting.parent else None
        boundaries = feature.boundaries or old or fit_boundaries(feature, fitting.train)
        step = {"name": name, "kind": "buckets", "table": name, "column": column, "boundaries": boundaries}
        return step, len(boundaries) + 2
    weights = feature.weight_column if isinstance(feature, Bag) else None
    step = {"name": name, "table": table_of(feature), "column": column, "weights": weights}
    if feature.hash_rows:
        return step | {"kind": "hash", "rows": feature.hash_rows}, 0
    return step | {"kind": "vocabulary"}, 0
