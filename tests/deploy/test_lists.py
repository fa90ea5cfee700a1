"""Bags with weights and histories, from raw rows through DIN to scores of a real server."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deploy.client import Client
from etl.faults import Fault
from tests.deploy.conftest import command
from tests.deploy.test_serving import deploy, serving

EXPERIMENT = """
name = "lists"
seed = 3

[data]
format = "parquet"
train = ["{folder}/train.parquet"]
test = ["{folder}/test.parquet"]

[[tasks]]
name = "click"

[[features]]
type = "categorical"
name = "item"
dtype = "int64"

[[features]]
type = "sequence"
name = "history"
table = "item"
dtype = "int64"
max_length = 4

[[features]]
type = "bag"
name = "tags"
max_length = 3
weight_column = "tag_weights"
combiner = "mean"

[[features]]
type = "numeric"
name = "price"
as = "field"

[model]
kind = "din"
hidden = [16]
attention = [{{ query = ["item"], keys = ["history"] }}]

[embedding]
dim = 8
init_std = 0.3
optimizer = "adam"
learning_rate = 0.01

[train]
batch_size = 64
epochs = 8
learning_rate = 0.01

[serve]
max_batch_size = 32
user = ["history", "tags", "tag_weights"]
"""


def raw_rows(rows: int, *, seed: int) -> pa.Table:
    """A click is likely where the item is in the history; some bags and histories are empty, null or too long."""
    rng = np.random.default_rng(seed)
    history = [rng.integers(0, 20, rng.integers(0, 7)).tolist() for _ in range(rows)]
    item = [int(rng.choice(past)) if past and rng.random() < 0.5 else int(rng.integers(0, 20)) for past in history]
    tags = [rng.choice(list("abcé"), rng.integers(0, 4)).tolist() for _ in range(rows)]
    click = [float(rng.random() < (0.9 if it in past else 0.1)) for it, past in zip(item, history, strict=True)]
    columns = {
        "item": pa.array(item),
        "history": pa.array([past or None for past in history], pa.list_(pa.int64())),
        "tags": pa.array(tags, pa.list_(pa.string())),
        "tag_weights": pa.array([rng.random(len(each)).tolist() for each in tags], pa.list_(pa.float64())),
        "price": pa.array(rng.random(rows)),
        "click": pa.array(click),
    }
    return pa.table(columns)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lists")
    for name, rows, seed in (("train", 3000, 1), ("test", 300, 2)):
        pq.write_table(raw_rows(rows, seed=seed), folder / f"{name}.parquet")
    experiment = folder / "lists.toml"
    experiment.write_text(EXPERIMENT.format(folder=folder))
    command("etl", "run", experiment, "--out", folder / "data")
    command("recsys", "train", experiment, "--data", folder / "data", "--run", folder / "run")
    command("deploy", "export", folder / "run", "--out", folder / "bundle")
    assert json.loads((folder / "run" / "result.json").read_text())["test"]["auc"] > 0.7
    return folder / "bundle"


@pytest.fixture(scope="module")
def url(bundle: Path) -> Iterator[str]:
    with serving(bundle) as (_, address):
        yield address


@pytest.mark.triton
def test_every_served_score_is_the_offline_one(bundle: Path, url: str) -> None:
    done = deploy("verify", bundle, "--url", url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test split: 300 of 300 rows equal within 1e-06" in done.stdout


@pytest.mark.triton
def test_dicts_with_lists_are_packed_by_the_client(url: str) -> None:
    table = raw_rows(40, seed=5).drop_columns(["click"])
    with Client(url) as client:
        from_table, from_dicts = client.score(table, ids=True), client.score(table.to_pylist(), ids=True)
    np.testing.assert_array_equal(from_table.score, from_dicts.score)
    assert from_table.ids is not None
    assert from_table.ids.shape == (40, 1 + 4 + 3 + 1)
    assert (from_table.ids[:, 1:8] == -1).any()


@pytest.mark.triton
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tags": [["a"] * 4], "tag_weights": [[1.0] * 4]}, "column 'tags' holds 4 values at row 0, at most 3"),
        ({"tag_weights": [[1.0, 2.0, 3.0]]}, "lists of different lengths"),
        ({"history": [[1.5]]}, "column 'history' holds double"),
        ({"tag_weights": [[float("nan")]]}, "column 'tag_weights' holds nan"),
    ],
)
def test_lists_that_the_model_does_not_take(url: str, change: dict[str, object], message: str) -> None:
    row = {"item": [1], "history": [[1, 2]], "tags": [["a"]], "tag_weights": [[1.0]], "price": [0.5]} | change
    with Client(url) as client, pytest.raises(Fault, match=message):
        client.score(pa.table(row))
