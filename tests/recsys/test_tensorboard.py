"""Event files say what metrics.jsonl says, each step once, also after a crash."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from etl.faults import Fault
from recsys.experiment import Experiment
from recsys.train import train

pytestmark = pytest.mark.usefixtures("quiet")
installed = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="needs the optional package 'tensorboard'"
)


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by name, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def logged(run: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in record.items():
            if name != "step" and not isinstance(value, str):
                found.setdefault(name, []).append((record["step"], pytest.approx(value, rel=1e-6)))
    return found


@installed
def test_scalars_are_those_of_the_log_also_after_a_crash(
    dataset: Path, tmp_path: Path, experiment: Callable[..., Experiment]
) -> None:
    settings = experiment(train={"tensorboard": True, "checkpoint_every_steps": 10})

    def stop(record: Any) -> None:
        if record["step"] == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, data=dataset, run=tmp_path / "run", report=stop)
    train(settings, data=dataset, run=tmp_path / "run", report=lambda record: None)
    found = scalars(tmp_path / "run")
    assert found == logged(tmp_path / "run")
    assert {"loss", "valid/auc", "rows_per_second", "imbalance", "memory_gb"} <= found.keys()


def test_without_the_option_there_are_no_event_files(
    dataset: Path, tmp_path: Path, experiment: Callable[..., Experiment]
) -> None:
    train(experiment(train={"epochs": 1}), data=dataset, run=tmp_path / "run", report=lambda record: None)
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_a_missing_package_is_a_fault_before_any_work(
    dataset: Path, tmp_path: Path, experiment: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Fault, match=r"train\.tensorboard: got no package 'tensorboard'.*pip install"):
        train(experiment(train={"tensorboard": True}), data=dataset, run=tmp_path / "run", report=lambda record: None)
    assert not (tmp_path / "run").exists()
