"""A small dataset folder with a known signal, as the ETL would leave it, and experiments that train on it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from etl.artifact import write_json
from etl.experiment_file import parse
from etl.schema import DenseFeature, IdFeature, Schema, Table, TaskColumn
from recsys.experiment import Experiment
from recsys.progress import quiet_libraries

ROWS = {"user": 60, "item": 30, "pair": 400}
SPLITS = {"train": 6000, "valid": 2000, "test": 2000}
RAW: dict[str, Any] = {
    "name": "known",
    "seed": 3,
    "data": {"train": ["train.csv"], "valid": ["valid.csv"], "test": ["test.csv"]},
    "features": [
        {"type": "categorical", "columns": ["user", "item"]},
        {"type": "cross", "name": "pair", "inputs": ["user", "item"], "hash_rows": 400, "linear_only": True},
        {"type": "numeric", "columns": ["x", "y"]},
    ],
    "tasks": [{"name": "click"}],
    "model": {"kind": "wide_deep", "hidden": [16, 8], "keep_prob": 0.9},
    "train": {"batch_size": 256, "epochs": 2, "log_every_steps": 5},
    "embedding": {"dim": 8},
}
SCHEMA = Schema(
    features=tuple(
        IdFeature(name=name, type="cross" if name == "pair" else "categorical", table=name, linear_only=name == "pair")
        for name in ROWS
    ),
    dense=(DenseFeature(name="x"), DenseFeature(name="y")),
    tables=tuple(Table(name=name, rows=rows) for name, rows in ROWS.items()),
    tasks=(TaskColumn(name="click", positive_rate=0.5),),
)


def experiment(**sections: Any) -> Experiment:
    """The experiment above; a section that is a dict is merged into the one there, another value replaces it."""
    raw = RAW | {key: RAW.get(key, {}) | value if isinstance(value, dict) else value for key, value in sections.items()}
    return parse(raw, place="known.toml", into=Experiment)


def write_dataset(folder: Path, *, shuffle_labels: bool = False) -> Path:
    """Clicks of probability sigmoid(user + item + x); `y` is noise. The best possible AUC is about 0.85."""
    rng = np.random.default_rng(7)
    user_weight, item_weight = rng.normal(size=ROWS["user"]), rng.normal(size=ROWS["item"])
    for split, size in SPLITS.items():
        ids = {name: rng.integers(0, rows, size) for name, rows in ROWS.items()}
        x, y = rng.normal(size=(2, size)).astype(np.float32)
        chance = 1 / (1 + np.exp(-(user_weight[ids["user"]] + item_weight[ids["item"]] + x)))
        click = (rng.random(size) < chance).astype(np.float32)
        click = rng.permutation(click) if shuffle_labels else click
        (folder / split).mkdir(parents=True)
        table = pa.table({**ids, "x": x, "y": y, "click": click})
        half = size // 2 + 17
        for at, part in enumerate((table.slice(0, half), table.slice(half))):
            pq.write_table(part, folder / split / f"part-{at}.parquet", row_group_size=700)
    (folder / "transform").mkdir()
    SCHEMA.write(folder)
    write_json(folder / "manifest.json", {"hash": experiment().data_hash(), "files": {}})
    return folder


@pytest.fixture
def quiet() -> None:
    """What the command line silences: torch and torchrec on their own deprecations."""
    quiet_libraries()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("known") / "data")


@pytest.fixture(scope="session")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("noise") / "data", shuffle_labels=True)


@pytest.fixture(name="experiment", scope="session")
def _experiment() -> Callable[..., Experiment]:
    return experiment


@pytest.fixture
def schema() -> Schema:
    return SCHEMA
