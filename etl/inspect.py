"""What a dataset folder holds, as numbers a person checks before training."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import polars as pl

from etl.artifact import Json, lost_files, read_json
from etl.faults import Fault
from etl.profile import id_figures, label_slices, number_figures, row_counts
from etl.schema import IdFeature, Schema, read_schema


def inspect(folder: Path) -> Json:
    """Rows and label rates by split, by day or raw file, and along each split; figures of id and of dense features.

    `missing` and `unseen` are shares of a feature's values: of its rows, or of all ids in a list feature; of a dense
    feature `missing` is the share of rows that are filled, or of an encoding lack one of its values. Drift is the
    population stability index between training and a split; see `etl.profile`.

    Raises:
        Fault: no complete dataset folder stands there, or one that has lost files.
    """
    manifest = read_json(folder / "manifest.json", remedy="make the folder with `python -m etl run`")
    if lost := lost_files(folder, manifest["files"]):
        got, wanted = f"{len(lost)} of its files lost or cut, such as {lost[0]}", "the files of its manifest"
        raise Fault(str(folder), got=got, wanted=wanted, remedy="make the folder anew with `python -m etl run`")
    schema = read_schema(folder)
    steps = read_json(folder / "transform" / "transform.json", remedy="make the folder with `python -m etl run`")
    boundaries = {step["name"]: step["boundaries"] for step in steps["features"] if step["kind"] == "buckets"}
    splits = manifest["splits"]
    rows = {split: counted["rows"] for split, counted in splits.items()}
    return {
        "folder": str(folder),
        "engine": manifest["engine"],
        "splits": {split: {"rows": s["rows"], "label_rate": s["label_rate"]} for split, s in splits.items()},
        "label_rate_by_position": {
            split: label_slices(folder, split, tasks=schema.task_names, rows=count) for split, count in rows.items()
        },
        "label_rate_by_day": _by_day({split: counted.get("label_parts") for split, counted in splits.items()}),
        "features": [
            _id_feature(folder, feature, schema=schema, splits=splits, boundaries=boundaries.get(feature.name))
            for feature in schema.features
        ],
        "dense": [
            {"name": figures["name"], "missing": _dense_missing(figures["name"], splits)} | figures
            for figures in number_figures(folder, schema.dense_names, rows=rows)
        ],
    }


def _dense_missing(name: str, splits: Json) -> dict[str, float | None]:
    """The shares of filled rows; None for a folder that an older program made."""
    return {
        split: counted["dense"][name]["missing"] / counted["rows"] if "dense" in counted else None
        for split, counted in splits.items()
    }


def _by_day(parts: Mapping[str, Json | None]) -> Json | None:
    """Rows and label rates by day, or by raw file, of each split; None for a folder that an older program made."""
    known = {split: part for split, part in parts.items() if part}
    if not known:
        return None
    rates = {
        split: [
            {"name": p["name"], "rows": p["rows"], "label_rate": {task: n / p["rows"] for task, n in p["ones"].items()}}
            for p in part["parts"]
        ]
        for split, part in known.items()
    }
    return {"by": known["train"]["by"], "splits": rates}


def _id_feature(
    folder: Path, feature: IdFeature, *, schema: Schema, splits: Json, boundaries: list[float] | None
) -> Json:
    listed = feature.dtype != "int64"
    figures = id_figures({split: row_counts(folder, split, name=feature.name, listed=listed) for split in splits})
    shares = {
        kind: {
            split: s["features"][feature.name][kind] / max(figures["values"][split], 1) for split, s in splits.items()
        }
        for kind in ("missing", "unseen")
    }
    texts = _texts(folder, feature, rows=[top["row"] for top in figures["top"]], boundaries=boundaries)
    figures["top"] = [{"row": top["row"], "value": texts.get(top["row"])} | top for top in figures["top"]]
    named = {"name": feature.name, "type": feature.type, "table": feature.table, "rows": schema.rows(feature.table)}
    return named | shares | figures


def _texts(folder: Path, feature: IdFeature, *, rows: list[int], boundaries: list[float] | None) -> Mapping[int, str]:
    """What the rows of a table stand for, where that is known: hashed values are not kept."""
    if boundaries is not None:
        ends = ["", *(f"{edge:g}" for edge in boundaries), ""]
        names = [_span(low, high) for low, high in pairwise(ends)]
        return dict(enumerate(names, start=1))
    path = folder / "transform" / "vocabulary" / f"{feature.table}.parquet"
    if not path.is_file():
        return {}
    found = pl.scan_parquet(path).filter(pl.col("row").is_in(rows)).select("row", pl.col("value").cast(pl.String))
    return dict(found.collect(engine="streaming").iter_rows())


def _span(low: str, high: str) -> str:
    if low and high:
        return f"{low} to {high}"
    return f"from {low}" if low else f"below {high}"
