"""On two ranks: a step in parts is one large step, and what is logged tells of both."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

from etl.faults import Fault
from recsys.checkpoint import Checkpoints
from recsys.failure import replay
from recsys.learner import Learner
from recsys.parallel.world import World, open_world
from recsys.progress import quiet_libraries
from recsys.train import Trainer, train
from tests.e2e.test_ranks import run_on_two_ranks
from tests.recsys.conftest import SCHEMA, experiment, write_dataset
from tests.recsys.test_failure import BAD_PLACES, spoil
from tests.recsys.test_learner import CASES, compare

pytestmark = [pytest.mark.slow, pytest.mark.dist]


def in_parts(folder: Path) -> None:
    quiet_libraries()
    with open_world("cpu") as world:
        for rows, dense in CASES:
            compare(rows, dense, data=folder / "data", world=world)


def log_a_step(folder: Path) -> None:
    """Rank 1 says that it worked three times as long as rank 0."""
    quiet_libraries()
    with open_world("cpu") as world, Checkpoints(folder, world=world, keep=1) as checkpoints:
        trainer = trainer_of(folder, checkpoints, world=world)
        trainer.resume()
        trainer.step(next(trainer.rest_of_epoch()))
        trainer.learner.clock.read = lambda: {"forward": 1.0 + 2.0 * world.rank, "lookup": 9.0}
        trainer.log_if_due()


def stop_at_a_bad_row(folder: Path) -> None:
    """One of the ranks has it; what each says is kept."""
    quiet_libraries()
    with pytest.raises(Fault) as told:
        train(experiment(), data=folder / "data", run=folder / "run", report=lambda line: None)
    (folder / f"said-{os.environ['RANK']}").write_text(str(told.value))


def trainer_of(folder: Path, checkpoints: Checkpoints, *, world: World) -> Trainer:
    learner = Learner(experiment(), SCHEMA, world=world)
    where = {"data": folder / "data", "checkpoints": checkpoints, "learner": learner, "report": lambda line: None}
    return Trainer(experiment(), SCHEMA, **where)


def test_a_step_in_parts_is_one_large_step_for_every_optimizer(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    run_on_two_ranks(__name__, "in_parts", folder=tmp_path)


def test_both_ranks_name_the_raw_row_of_a_loss_that_goes_wrong_on_one(tmp_path: Path) -> None:
    spoil(write_dataset(tmp_path / "data"), 1e38)
    run_on_two_ranks(__name__, "stop_at_a_bad_row", folder=tmp_path)
    own, other = sorted(
        ((tmp_path / f"said-{rank}").read_text() for rank in range(2)), key=lambda text: "ended" in text
    )
    assert "feature: 'x'" in own and any(place in own for place in BAD_PLACES), own
    assert re.search(r"got rank \d on .* \(process \d+\) ended: ", other) and own in other, other
    (failure,) = (tmp_path / "run" / "failures").iterdir()
    assert str(failure) in own and float(replay(tmp_path / "run", failure).nan_to_num(torch.inf).max()) > 1e30


def test_a_line_tells_how_unevenly_the_ranks_worked(tmp_path: Path) -> None:
    """Waiting in a lookup for another rank is no work."""
    write_dataset(tmp_path / "data")
    run_on_two_ranks(__name__, "log_a_step", folder=tmp_path)
    (line,) = (json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (line["step"], line["rows"], line["imbalance"]) == (1, 512, 1.5)
    assert line["ms/lookup"] == 9000.0
