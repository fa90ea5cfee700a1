"""Bags with weights and histories, from raw rows through DIN to scores of a real server."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from deploy.client import Client
from etl.faults import Fault
from tests.deploy.conftest import Served, raw_lists
from tests.deploy.test_serving import deploy


@pytest.fixture(scope="module")
def bundle(lists_bundle: Path) -> Path:
    assert json.loads((lists_bundle.parent / "run" / "result.json").read_text())["test"]["auc"] > 0.7
    return lists_bundle


@pytest.fixture(scope="module")
def url(lists_served: Served) -> str:
    return lists_served.url


@pytest.mark.triton
def test_every_served_score_is_the_offline_one(bundle: Path, url: str) -> None:
    done = deploy("verify", bundle, "--url", url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "golden rankings: 68 of 68 rows equal within 1e-06" in done.stdout
    assert "test split: 300 of 300 rows equal within 1e-06" in done.stdout


@pytest.mark.triton
def test_dicts_with_lists_are_packed_by_the_client(url: str) -> None:
    table = raw_lists(40, seed=5).drop_columns(["click"])
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
