"""Losses that go wrong stop training, with the step, the feature, the rows, and a batch that shows it again."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from etl.faults import Fault
from recsys.checkpoint import latest
from recsys.cli import app
from recsys.data import Batch
from recsys.experiment import Experiment
from recsys.failure import LossGuard, replay
from recsys.learner import Guard, Learner
from recsys.network import Scored
from recsys.parallel.state import read_tensors
from recsys.train import train
from tests.recsys.conftest import write_dataset

pytestmark = pytest.mark.usefixtures("quiet")
BAD_FILE, BAD_ROWS = "part-1.parquet", [1234, 1235]
BAD_PLACES = [f"{BAD_FILE}, row {row} (day_1.csv: row {3017 + row - 4000 + 1})" for row in BAD_ROWS]
"""The first shard has 3,017 rows, the first raw file 4,000."""


@pytest.fixture
def spoilt(tmp_path: Path) -> Callable[[float], Path]:
    """A dataset folder with a value of `x` in two training rows that no other row comes near; one is a click, one not.

    So one of the two is far off, whatever the sign of its weight.
    """

    return lambda value: spoil(write_dataset(tmp_path / "data"), value)


def spoil(folder: Path, value: float) -> Path:
    path = folder / "train" / BAD_FILE
    table = pq.read_table(path)
    columns = {name: table[name].to_numpy().copy() for name in table.column_names}
    columns["x"][BAD_ROWS] = value
    columns["click"][BAD_ROWS] = (0, 1)
    pq.write_table(pa.table(columns), path, row_group_size=700)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"] = {"train": {"files": {"day_0.csv": 4000, "day_1.csv": 2000}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def stopped(experiment: Experiment, *, data: Path, run: Path) -> Fault:
    with pytest.raises(Fault, match="a logloss of") as caught:
        train(experiment, data=data, run=run, report=lambda record: None)
    return caught.value


@pytest.mark.parametrize(
    ("value", "accumulate", "compiled"), [(1e38, 1, False), (3e5, 1, False), (1e38, 2, False), (1e38, 1, True)]
)
def test_a_value_that_explodes_stops_with_its_place(
    spoilt: Callable[[float], Path],
    experiment: Callable[..., Experiment],
    tmp_path: Path,
    value: float,
    accumulate: int,
    compiled: bool,
) -> None:
    """1e38 makes the loss infinite, 3e5 a spike."""
    size = 32 if value < 1e38 else 256  # a spike needs 100 steps of usual losses before it
    settings = {"batch_size": size // accumulate, "accumulate": accumulate, "epochs": 2, "checkpoint_every_steps": 3}
    settings["compile"] = compiled
    run = tmp_path / "run"
    fault = stopped(experiment(train=settings, model={"keep_prob": 1.0}), data=spoilt(value), run=run)
    assert any(place in str(fault) for place in BAD_PLACES), fault
    assert "feature: 'x'" in str(fault), fault
    step = int(re.search(r"step (\d+)", fault.place).group(1))  # type: ignore[union-attr]
    folder = run / "failures" / f"step-{step}-rank-0"
    about = json.loads((folder / "failure.json").read_text())
    assert (about["step"], about["feature"]) == (step, "'x'")
    losses_B = replay(run, folder)
    assert losses_B.nan_to_num(torch.inf).argmax() == about["positions"][0]
    assert not torch.isfinite(losses_B).all() or float(losses_B.max()) > 1000
    told = CliRunner().invoke(app, ["replay", str(run), str(folder)])
    assert told.exit_code == 0 and f"step {step}, a logloss of {about['loss']}; feature: 'x'" in told.output
    worst = f"row {about['positions'][0]} of the batch: logloss {float(losses_B[about['positions'][0]]):.6g}"
    assert f"{worst}, {about['rows'][0]}" in told.output and f"all {len(losses_B)} rows" in told.output
    found = latest(run)
    assert found is None or found[1].step < step, "what went wrong is in no checkpoint"


@pytest.mark.parametrize("due", ["log_every_steps", "checkpoint_every_steps", "eval_every_steps"])
def test_what_nobody_looked_at_is_in_no_checkpoint(
    dataset: Path, experiment: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, due: str
) -> None:
    """As on a GPU, where the guard looks at logged steps alone: step 5 goes wrong and moves the weights."""

    def unseen(guard: LossGuard, scored: Scored, batch: Batch, *, logloss: Tensor) -> None:
        if guard.step == 5:
            scored.logits_BT.data.fill_(torch.nan)

    monkeypatch.setattr(LossGuard, "__call__", unseen)
    chosen = experiment(train={"log_every_steps": 1000, "checkpoint_every_steps": 4} | {due: 4})
    with pytest.raises(Fault, match=r"step 8: got a loss that is not finite.*log_every_steps=1"):
        train(chosen, data=dataset, run=tmp_path / "run", report=lambda record: None)
    found = latest(tmp_path / "run")
    assert found and found[1].step == 4
    assert all(torch.isfinite(tensor).all() for tensor in read_tensors(found[0]).values())


def test_weights_that_a_finite_loss_broke_are_not_saved(
    dataset: Path, experiment: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Learner.update

    def breaks(learner: Learner, batch: Batch, *, step: int, guard: Guard) -> Tensor:
        loss = update(learner, batch, step=step, guard=guard)
        if step == 4:
            next(learner.network.head.parameters()).data[0] = torch.nan
        return loss

    monkeypatch.setattr(Learner, "update", breaks)
    with pytest.raises(Fault, match=r"run: step 4: got weights of the head that are not finite: wide\.bias_T; wanted"):
        train(
            experiment(train={"checkpoint_every_steps": 2}), data=dataset, run=tmp_path / "run", report=lambda r: None
        )
    found = latest(tmp_path / "run")
    assert found and found[1].step == 2


def test_scores_that_are_not_finite_stop_with_the_step_and_the_first_row(
    dataset: Path, experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    """After the only step of an epoch no later loss shows it."""
    steps = {"batch_size": 6000, "epochs": 1, "optimizer": "sgd", "learning_rate": 1e30}
    with pytest.raises(
        Fault, match=r"run: step 1: got no finite score of 2,000 of 2,000 rows, first .*part-0.*, row 0;"
    ):
        train(experiment(train=steps), data=dataset, run=tmp_path / "run", report=lambda record: None)
    assert latest(tmp_path / "run") is None


def test_a_folder_that_no_stopped_run_left_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["replay", str(tmp_path), str(tmp_path / "none")])
    assert done.exit_code == 2 and "below 'failures'" in done.output


def test_usual_losses_do_not_stop_training(
    dataset: Path, experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    wide = experiment(train={"batch_size": 8, "epochs": 1, "log_every_steps": 1000})
    result = train(wide, data=dataset, run=tmp_path / "run", report=lambda record: None)
    assert result["steps"] == 750
