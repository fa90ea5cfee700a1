"""What served scores and values are compared with: those of the validation rows, kept at export."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from deploy.monitor import binned
from etl.artifact import Json, read_json, write_json
from etl.schema import Schema

REFERENCE = "reference.json"
_BINS = 10
_MOST_ROWS = 1_000_000  # of a number, evenly spaced, that are sorted for its deciles


def write_reference(run: Path, folder: Path, *, schema: Schema, dataset: Path) -> None:
    """Writes `reference.json`: bins of each task's scores and of each number that the network reads, and how often each
    feature's value had a row of its own.

    The validation rows' scores are those that the run wrote: scores of training rows are sharper than any that are
    served. Values and numbers come from the dataset folder; without one, and for lists, there is no reference.

    Raises:
        Fault: the run's predictions are gone.
    """
    has_rows = (dataset / "valid").is_dir()
    parts = {
        "scores": _scores(run, schema),
        "features": _values(dataset, schema) if has_rows else {},
        "numbers": _numbers(dataset, schema) if has_rows else {},
    }
    write_json(folder / REFERENCE, parts)


def _scores(run: Path, schema: Schema) -> Json:
    table = pq.read_table(run / "predictions" / "valid.parquet", columns=schema.task_names)
    return {task: _bins(table[task].to_numpy()) for task in schema.task_names}


def _bins(value_R: npt.NDArray[np.float32]) -> Json:
    """Deciles, fewer where values repeat."""
    edges = np.unique(np.quantile(value_R.astype(np.float64), np.arange(1, _BINS) / _BINS)).tolist()
    return {"edges": edges, "counts": binned(value_R, edges).tolist()}


def _values(dataset: Path, schema: Schema) -> Json:
    single = [feature.name for feature in schema.features if feature.slots == 1 and feature.type != "field"]
    valid = read_json(dataset / "manifest.json", remedy="run the ETL again")["splits"]["valid"]
    counts = {name: (valid["features"][name]["missing"], valid["features"][name]["unseen"]) for name in single}
    return {name: [valid["rows"] - missing - unseen, missing, unseen] for name, (missing, unseen) in counts.items()}


def _numbers(dataset: Path, schema: Schema) -> Json:
    """Of dense inputs and fields, a column at a time."""
    columns = {name: name for name in schema.dense_names}
    columns |= {feature.name: f"{feature.name}:value" for feature in schema.features if feature.type == "field"}
    found = {}
    for name, column in columns.items():
        value_R = pq.read_table(dataset / "valid", columns=[column])[column].to_numpy()
        if len(value_R):
            found[name] = _bins(value_R[:: -(-len(value_R) // _MOST_ROWS)])
    return found
