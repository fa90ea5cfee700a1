"""Checkpoints: written beside training, newest and best kept, whole or passed over."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from etl.faults import Fault
from etl.schema import Schema
from recsys.checkpoint import Checkpoints, Progress, best, latest
from recsys.evaluate import evaluate
from recsys.experiment import Experiment
from recsys.learner import Learner
from recsys.parallel.state import read_tensors, restore
from recsys.parallel.world import World, open_world
from recsys.predict import load_network
from recsys.train import train

pytestmark = pytest.mark.usefixtures("quiet")
TABLE = "model.tables.embedding_bags.user.weight"


@pytest.fixture
def world() -> Iterator[World]:
    with open_world("cpu") as alone:
        yield alone


@pytest.fixture
def learner(world: World, experiment: Callable[..., Experiment], schema: Schema) -> Learner:
    return Learner(experiment(embedding={"optimizer": "adam"}), schema, world=world)


@pytest.fixture
def checkpoints(world: World, tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path, world=world, keep=2)


def user_rows(learner: Learner) -> Tensor:
    return learner.model.state_dict()["tables.embedding_bags.user.weight"].local_shards()[0].tensor


def save(checkpoints: Checkpoints, learner: Learner, *, steps: list[int], best_step: int = 0) -> None:
    """Each with its step as every weight of the user table."""
    for step in steps:
        user_rows(learner).fill_(step)
        progress = Progress(seed=0, step=step, best_step=best_step, best=0.5 if best_step else None)
        checkpoints.save(progress, sharded=learner.sharded, optimizer=learner.optimizer)
    checkpoints.wait()


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_what_is_saved_is_the_moment_of_the_call(checkpoints: Checkpoints, learner: Learner) -> None:
    user_rows(learner).fill_(7.0)
    for parameter in learner.network.head.parameters():
        parameter.detach().fill_(7.0)
    checkpoints.save(Progress(seed=0, step=1), sharded=learner.sharded, optimizer=learner.optimizer)
    user_rows(learner).fill_(8.0)
    for parameter in learner.network.head.parameters():
        parameter.detach().fill_(8.0)
    checkpoints.wait()
    saved = read_tensors(checkpoints.run / "checkpoints" / "step-1")
    weights = [tensor for name, tensor in saved.items() if name == TABLE or name.startswith("model.head")]
    assert len(weights) > 3 and all((tensor == 7.0).all() for tensor in weights)


def test_newest_and_best_are_kept_and_nothing_else(checkpoints: Checkpoints, learner: Learner) -> None:
    partial = checkpoints.run / "checkpoints" / ".step-4.partial"
    partial.mkdir(parents=True)
    (partial / "__9_0.distcp").write_bytes(b"of a process that was killed")
    save(checkpoints, learner, steps=[1, 2, 3, 4], best_step=2)
    assert names(checkpoints.run) == ["step-2", "step-3", "step-4"]
    assert not (checkpoints.run / "checkpoints" / "step-4" / "__9_0.distcp").exists()
    assert best(checkpoints.run).name == "step-2"


def break_a_shard(folder: Path) -> None:
    """One bit, the size stays."""
    path = next(folder.glob("*.distcp"))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def cut_a_shard(folder: Path) -> None:
    path = next(folder.glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:-1])


def lose_a_shard(folder: Path) -> None:
    next(folder.glob("*.distcp")).unlink()


def break_the_marker(folder: Path) -> None:
    (folder / "complete").write_text("{")


def break_the_best(folder: Path) -> None:
    break_a_shard(folder.with_name("step-2"))


@pytest.mark.parametrize("harm", [break_a_shard, cut_a_shard, lose_a_shard, break_the_marker, break_the_best])
def test_a_damaged_newest_one_falls_back(
    checkpoints: Checkpoints, learner: Learner, caplog: pytest.LogCaptureFixture, harm: Callable[[Path], None]
) -> None:
    save(checkpoints, learner, steps=[2, 3], best_step=2)
    harm(checkpoints.run / "checkpoints" / "step-3")
    with caplog.at_level(logging.WARNING):
        found = checkpoints.newest()
    broken = {"step-2", "step-3"} if harm is break_the_best else {"step-3"}
    assert (found[1].step if found else None) == (None if harm is break_the_best else 2)
    assert {f"damaged-{name}" for name in broken} <= set(names(checkpoints.run))
    assert all(name in caplog.text for name in broken) and "going on from the one before" in caplog.text
    if found:
        restore(found[0], learner.sharded, optimizer=learner.optimizer)
        assert (user_rows(learner) == 2.0).all()


def test_weights_that_are_not_as_written_are_neither_evaluated_nor_loaded(
    experiment: Callable[..., Experiment], dataset: Path, tmp_path: Path
) -> None:
    """A flipped bit of a float would load as another weight."""
    run = tmp_path / "run"
    train(experiment(train={"epochs": 1}), data=dataset, run=run, report=lambda record: None)
    path = next(best(run).glob("*.distcp"))
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(Fault, match="other content than was written"):
        evaluate(run, data=dataset, split="test")
    with pytest.raises(Fault, match="other content than was written"):
        load_network(run)
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    assert evaluate(run, data=dataset, split="test") and load_network(run)


def test_a_write_that_fails_is_raised_by_the_next_call(checkpoints: Checkpoints, learner: Learner) -> None:
    (checkpoints.run / "checkpoints").write_text("a file where the folder should be")
    checkpoints.save(Progress(seed=0, step=1), sharded=learner.sharded, optimizer=learner.optimizer)
    with pytest.raises(RuntimeError, match="no checkpoint was written"):
        checkpoints.wait()


def test_a_run_without_checkpoints_has_none(checkpoints: Checkpoints) -> None:
    assert checkpoints.newest() is None
    assert latest(checkpoints.run) is None
    with pytest.raises(Fault, match="no complete checkpoint"):
        best(checkpoints.run)


def test_states_of_both_moments_come_back(checkpoints: Checkpoints, learner: Learner) -> None:
    group = learner.sharded.rows.groups[0] if learner.sharded.rows else None
    assert group is not None and group.second_RW is not None
    for state, value in zip(group.states, (3.0, 4.0), strict=True):
        state.fill_(value)
    save(checkpoints, learner, steps=[5])
    for state in group.states:
        state.zero_()
    found = checkpoints.newest()
    assert found is not None
    restore(found[0], learner.sharded, optimizer=learner.optimizer)
    assert [float(state.mean()) for state in group.states] == [3.0, 4.0]
    assert torch.equal(user_rows(learner), torch.full_like(user_rows(learner), 5.0))
