"""What a dataset folder holds, as numbers a person checks before training."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from etl.artifact import Json, read_json
from etl.schema import Schema, read_schema

_BINS = 10


def inspect(folder: Path) -> Json:
    """Rows and label rates by split; by feature its table rows, missing and unseen shares, and drift from training.

    Drift is the population stability index sum((p - q) ln(p / q)) between training and a split: over the ten most
    frequent rows and the rest for ids, over training deciles for dense values. Below .1 is usually read as stable.

    Raises:
        Fault: no complete dataset folder stands there.
    """
    manifest = read_json(folder / "manifest.json", remedy="make the folder with `python -m etl run`")
    schema = read_schema(folder)
    splits = manifest["splits"]
    return {
        "folder": str(folder),
        "engine": manifest["engine"],
        "splits": {name: {"rows": s["rows"], "label_rate": s["label_rate"]} for name, s in splits.items()},
        "features": [
            _id_row(f.name, schema, splits=splits) | _drift(folder, f.name, dense=False) for f in schema.features
        ],
        "dense": [
            {"name": name} | _moments(folder, name) | _drift(folder, name, dense=True) for name in schema.dense_names
        ],
    }


def _id_row(name: str, schema: Schema, *, splits: Json) -> Json:
    feature = next(f for f in schema.features if f.name == name)
    shares = {
        kind: {split: s["features"][name][kind] / s["rows"] for split, s in splits.items()}
        for kind in ("missing", "unseen")
    }
    return {"name": name, "rows": schema.rows(feature.table)} | shares


def _moments(folder: Path, name: str) -> dict[str, float]:
    x = pl.col(name)
    rows = pl.scan_parquet(folder / "train").select(mean=x.mean(), std=x.std(), min=x.min(), max=x.max())
    return rows.collect().row(0, named=True)


def _drift(folder: Path, name: str, *, dense: bool) -> dict[str, dict[str, float]]:
    values = {split: pl.read_parquet(folder / split, columns=[name])[name] for split in ("train", "valid", "test")}
    if values["train"].dtype == pl.List:
        values = {split: column.explode(empty_as_null=True).drop_nulls() for split, column in values.items()}
    if dense:
        edges = np.unique(np.quantile(values["train"].to_numpy(), np.linspace(0, 1, _BINS + 1)[1:-1]))
        shares = {split: np.bincount(np.searchsorted(edges, v.to_numpy(), side="right"), minlength=len(edges) + 1)
                  for split, v in values.items()}  # fmt: skip
    else:
        top = values["train"].value_counts(sort=True)[name].head(_BINS)
        shares = {split: np.array([*((v == t).sum() for t in top), (~v.is_in(top.implode())).sum()])
                  for split, v in values.items()}  # fmt: skip
    return {"psi": {split: _psi(shares["train"], shares[split]) for split in ("valid", "test")}}


def _psi(expected: np.ndarray[Any, Any], actual: np.ndarray[Any, Any]) -> float:
    p, q = ((counts + 0.5) / (counts.sum() + 0.5 * len(counts)) for counts in (expected, actual))
    return float(((p - q) * np.log(p / q)).sum())
