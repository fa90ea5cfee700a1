"""What metrics.jsonl says of speed, memory and balance."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from recsys.clock import Clock, gpu_memory_gb, milliseconds
from recsys.experiment import Experiment
from recsys.train import train

pytestmark = pytest.mark.usefixtures("quiet")
LAPS = {"data", "forward", "lookup", "backward", "sparse", "dense"}


def test_laps_add_up_to_the_whole_and_reading_begins_anew() -> None:
    clock = Clock()
    for name in ("a", "b", "a"):
        clock.lap(name)
    found = clock.read()
    assert list(found) == ["a", "b"] and min(found.values()) >= 0
    assert clock.read() == {}
    assert milliseconds({"a": 0.5}, steps=10) == {"ms/a": 50.0}


def test_a_gpu_s_memory_is_logged_beside_that_of_its_process(
    dataset: Path, experiment: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 3e9 + device.index)
    assert gpu_memory_gb(torch.device("cpu")) == 0.0
    assert gpu_memory_gb(torch.device("cuda", 1)) == pytest.approx(3.0, abs=1e-6)
    for name, found in (("cpu", {}), ("gpu", {"gpu_memory_gb": 2.5})):
        with monkeypatch.context() as told:
            told.setattr("recsys.train.gpu_memory_gb", lambda device, found=found: found.get("gpu_memory_gb", 0.0))
            train(experiment(train={"epochs": 1}), data=dataset, run=tmp_path / name, report=lambda record: None)
        line = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])
        assert {key: value for key, value in line.items() if key.startswith("gpu")} == found and line["memory_gb"] > 0


@pytest.mark.parametrize(("kind", "accumulate"), [("deepfm", 1), ("deepfm", 2), ("deep", 1)])
def test_each_line_says_where_the_time_went(
    dataset: Path, experiment: Callable[..., Experiment], tmp_path: Path, kind: str, accumulate: int
) -> None:
    settings = {"epochs": 1, "log_every_steps": 6, "batch_size": 256 // accumulate, "accumulate": accumulate}
    chosen = experiment(train=settings)
    raw = chosen.model_dump(mode="json", by_alias=True)
    raw["model"] = {"kind": kind, "hidden": [8]}
    train(Experiment.model_validate(raw), data=dataset, run=tmp_path / "run", report=lambda record: None)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 6, 12, 18, 24, 24]
    for line in lines[:5]:
        assert {f"ms/{name}" for name in LAPS} <= line.keys()
        assert all(line[f"ms/{name}"] >= 0 for name in LAPS)
        assert line["imbalance"] == 1.0 and line["memory_gb"] > 0.05 and line["rows_per_second"] > 0
        steps = sum(line[f"ms/{name}"] for name in LAPS) / 1000 * (5 if line["step"] == 6 else 6)
        assert line["step"] == 1 or steps <= line["seconds"]
    assert "ms/evaluation" not in lines[3] and lines[5]["ms/evaluation"] > 0
