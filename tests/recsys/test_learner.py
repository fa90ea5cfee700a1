"""Updates: a step of several batches is the step of one large batch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrec.distributed.types import ShardedTensor

from etl.schema import Schema
from recsys.data import Slice, Split
from recsys.experiment import Experiment
from recsys.learner import Learner
from recsys.parallel.state import snapshot
from recsys.parallel.world import World, open_world
from tests.recsys.conftest import SCHEMA, experiment

pytestmark = pytest.mark.usefixtures("quiet")
STEP_ROWS, LAST_ROWS = 256, 300
"""The last of two steps has 44 rows: parts of it are copies that fill it up."""

SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "learning_rate": 0.1},
    "momentum": {"optimizer": "momentum", "learning_rate": 0.1},
    "adagrad": {"optimizer": "adagrad", "learning_rate": 0.1, "accumulator_start": 0.01},
    "rowwise_adagrad": {"optimizer": "rowwise_adagrad", "learning_rate": 0.1, "eps": 1e-3},
    "adam": {"optimizer": "adam", "learning_rate": 0.05, "eps": 1e-3},
    "ftrl": {"optimizer": "ftrl", "learning_rate": 0.1, "accumulator_start": 0.1},
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("rowwise_adagrad", {"optimizer": "adam", "eps": 1e-3, "layer_l2": 0.01, "clip_norm": 0.05}),
    ("sgd", SETTINGS["sgd"]),
    ("momentum", SETTINGS["momentum"]),
    ("adagrad", SETTINGS["adagrad"]),
    ("adam", SETTINGS["adam"]),
    ("ftrl", SETTINGS["ftrl"]),
]


def flat(value: Any, name: str = "") -> dict[str, Tensor]:
    if isinstance(value, Mapping):
        parts = [flat(part, f"{name}/{key}") for key, part in value.items()]
        return {key: tensor for part in parts for key, tensor in part.items()}
    return {name: value.local_shards()[0].tensor if isinstance(value, ShardedTensor) else value}


def learnt(
    experiment: Experiment, schema: Schema, *, data: Path, world: World
) -> tuple[dict[str, Tensor], list[float]]:
    """This rank's weights and states after the last two steps of an epoch, and its losses."""
    split = Split(data / "train", schema)
    learner = Learner(experiment, schema, world=world)
    mine = Slice(world.rank, world.size, STEP_ROWS // world.size)
    batches = list(split.shuffled(mine, seed=1, epoch=0, start=split.rows - LAST_ROWS))
    losses = [learner.update(b, step=at, guard=lambda s, b, logloss: None) for at, b in enumerate(batches, start=1)]
    assert [batch.global_rows for batch in batches] == [STEP_ROWS, LAST_ROWS - STEP_ROWS]
    return flat(snapshot(learner.sharded, optimizer=learner.optimizer)), [float(loss) for loss in losses]


def compare(rows: str, dense: dict[str, Any], *, data: Path, world: World) -> None:
    """A step in four parts, and one of the same rows at once: losses, weights and states."""
    embedding = SETTINGS[rows] | {"l2": 1e-3 if rows == "adam" else 0.0, "sharding": "row_wise"}
    shared, of_rank = {"embedding": embedding, "model": {"keep_prob": 1.0}}, STEP_ROWS // world.size
    one = experiment(train=dense | {"batch_size": of_rank}, **shared)
    several = experiment(train=dense | {"batch_size": of_rank // 4, "accumulate": 4}, **shared)
    (wanted, losses), (found, parts) = (learnt(which, SCHEMA, data=data, world=world) for which in (one, several))
    assert parts == pytest.approx(losses, abs=1e-6)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)
    assert any(tensor.any() for name, tensor in wanted.items() if name.startswith("/tables")) or rows == "sgd"


@pytest.mark.parametrize(("rows", "dense"), CASES, ids=[name for name, _ in CASES])
def test_several_batches_are_one_large_batch(dataset: Path, rows: str, dense: dict[str, Any]) -> None:
    with open_world("cpu") as world:
        compare(rows, dense, data=dataset, world=world)
