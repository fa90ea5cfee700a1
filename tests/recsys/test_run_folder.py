"""A run goes on with what its checkpoints do not depend on; another experiment's run is refused."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from etl.artifact import sha256, write_json
from etl.faults import Fault
from recsys.evaluate import evaluate
from recsys.experiment import Experiment, read_experiment
from recsys.run_folder import open_run, refuse_other_transform
from tests.recsys.conftest import SCHEMA, experiment


@pytest.fixture
def run(dataset: Path, tmp_path: Path) -> Path:
    begin(tmp_path / "run", experiment(), data=dataset)
    return tmp_path / "run"


def begin(run: Path, chosen: Experiment, *, data: Path) -> None:
    open_run(run, chosen, schema=SCHEMA, data=data)


@pytest.mark.parametrize(
    "changed",
    [
        {"embedding": {"sharding": "row_wise", "forward_comm": "fp16", "cache_share": 0.5}},
        {"embedding": {"tables": {"item": {"sharding": "data_parallel"}}}},
        {"train": {"batch_size": 128, "accumulate": 2, "checkpoint_every_steps": 7, "keep": 3}},
        {"train": {"log_every_steps": 1, "tensorboard": True, "dead_after_s": 5.0}},
    ],
)
def test_a_run_goes_on_where_tables_lie_elsewhere(
    run: Path, dataset: Path, changed: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        begin(run, experiment(**changed), data=dataset)
    (line,) = caplog.messages
    assert "other settings" in line and all(f" {value}" in line for value in changed.get("train", {}).values())
    assert read_experiment(run) == experiment(**changed)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"embedding": {"precision": "fp16", "sharding": "row_wise"}}, r"\(embedding\.precision\)"),
        ({"embedding": {"tables": {"item": {"precision": "fp16"}}}}, r"embedding\.tables\.item\.precision"),
        ({"train": {"learning_rate": 0.5, "batch_size": 128}}, r"\(train\.learning_rate\)"),
        ({"seed": 9}, r"\(seed\)"),
    ],
)
def test_what_changes_the_model_is_refused(run: Path, dataset: Path, changed: dict[str, Any], named: str) -> None:
    with pytest.raises(Fault, match=named):
        begin(run, experiment(**changed), data=dataset)
    assert read_experiment(run) == experiment()


def test_a_run_that_ended_is_that_of_its_settings(run: Path, dataset: Path) -> None:
    write_json(run / "result.json", {})
    with pytest.raises(Fault, match=r"train\.batch_size"):
        begin(run, experiment(train={"batch_size": 64}), data=dataset)


@pytest.fixture
def fitted(dataset: Path, tmp_path: Path) -> Path:
    """A dataset folder with a fitted number, which its manifest lists."""
    folder = shutil.copytree(dataset, tmp_path / "data")
    refit(folder, mean=0.5)
    return folder


def refit(folder: Path, *, mean: float) -> None:
    write_json(folder / "transform" / "transform.json", {"mean": mean})
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {"transform/transform.json": {"sha256": sha256(folder / "transform" / "transform.json")}}
    write_json(folder / "manifest.json", manifest)


@pytest.mark.parametrize("ended", [False, True])
def test_rows_that_were_made_anew_are_refused(fitted: Path, tmp_path: Path, ended: bool) -> None:
    """The same sections, so the same hash, and other raw rows: ids and positions mean something else."""
    run = tmp_path / "run"
    begin(run, experiment(), data=fitted)
    if ended:
        write_json(run / "result.json", {})
    begin(run, experiment(), data=fitted)
    refuse_other_transform(run, fitted)
    refit(fitted, mean=0.25)
    with pytest.raises(Fault, match=r"data: got other rows or another transform than .*run learned from"):
        begin(run, experiment(), data=fitted)
    with pytest.raises(Fault, match=r"got transform/transform\.json of another fit than"):
        evaluate(run, data=fitted, split="test")


def test_a_split_that_there_is_not_is_refused(run: Path, dataset: Path) -> None:
    with pytest.raises(Fault, match="--split: got dev; wanted one of train, valid, test"):
        evaluate(run, data=dataset, split="dev")
