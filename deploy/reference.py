"""What served scores and values are compared with: those of the validation rows, kept at export."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from deploy.monitor import score_bins
from etl.artifact import Json, read_json, write_json
from etl.schema import Schema

REFERENCE = "reference.json"
_BINS = 10


def write_reference(run: Path, folder: Path, *, schema: Schema, dataset: Path) -> None:
    """Writes `reference.json`: score bins of each task, and how often each feature's value had a row of its own.

    The validation rows' scores are those that the run wrote: scores of training rows are sharper than any that are
    served. Values were counted in the dataset folder of the run; without one, and for lists, there is no reference.

    Raises:
        Fault: the run's predictions are gone.
    """
    write_json(folder / REFERENCE, {"scores": _scores(run, schema), "features": _values(dataset, schema)})


def _scores(run: Path, schema: Schema) -> Json:
    table = pq.read_table(run / "predictions" / "valid.parquet", columns=schema.task_names)
    found = {}
    for task in schema.task_names:
        score_R = table[task].to_numpy()
        edges = np.unique(np.quantile(score_R.astype(np.float64), np.arange(1, _BINS) / _BINS)).tolist()
        found[task] = {"edges": edges, "counts": score_bins(score_R, edges).tolist()}
    return found


def _values(dataset: Path, schema: Schema) -> Json:
    single = [feature.name for feature in schema.features if feature.slots == 1 and feature.type != "field"]
    if not (dataset / "manifest.json").is_file():
        return {}
    valid = read_json(dataset / "manifest.json", remedy="run the ETL again")["splits"]["valid"]
    counts = {name: (valid["features"][name]["missing"], valid["features"][name]["unseen"]) for name in single}
    return {name: [valid["rows"] - missing - unseen, missing, unseen] for name, (missing, unseen) in counts.items()}
