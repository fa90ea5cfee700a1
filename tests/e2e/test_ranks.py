"""Two processes train as one does: every model, and tables and states that change the number of ranks midway."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrec.distributed.types import ShardedTensor

from etl.schema import Schema, Table
from recsys.data import Batch
from recsys.experiment import Embedding, Train
from recsys.learner import dense_optimizer
from recsys.loss import mean_loss
from recsys.models import MODELS
from recsys.models.head import ModelConfig
from recsys.parallel.shard import shard
from recsys.parallel.state import restore, save
from recsys.parallel.world import World, mean_over_ranks, open_world
from recsys.progress import quiet_libraries
from tests.recsys.conftest import RAW, write_dataset
from tests.registry import config_of, id_feature, network_of, random_rows, rich_schema, schema_of

pytestmark = [pytest.mark.slow, pytest.mark.dist]

ROOT = Path(__file__).parents[2]
ROWS = 12
BEFORE, AFTER = (1, 2, 3), (4, 5)
WORKER = """
import importlib
import sys
from pathlib import Path

getattr(importlib.import_module(sys.argv[1]), sys.argv[2])(Path(sys.argv[3]))
"""
ADAM = {"optimizer": "adam", "learning_rate": 0.05, "eps": 1e-3}
MOMENTUM = {"optimizer": "momentum", "learning_rate": 0.1}
ADAGRAD = {"optimizer": "adagrad", "learning_rate": 0.1, "accumulator_start": 0.01}
FTRL = {"optimizer": "ftrl", "learning_rate": 0.1, "accumulator_start": 0.1}
TABLES = (
    ADAGRAD | {"sharding": "row_wise"},
    MOMENTUM | {"sharding": "table_wise", "l2": 0.01, "l2_scope": "table"},
    ADAM | {"sharding": "row_wise", "l2": 0.01, "linear_l2": 0.02},
)
"""One of them for each model: FBGEMM's own optimizer, and ours on some rows and on all."""

ONE_TABLE = schema_of((id_feature("user"),), dense=2, tasks=("click",))
ONE_ROW = ONE_TABLE.model_copy(
    update={
        "features": (id_feature("user"), id_feature("item"), id_feature("price")),
        "tables": (Table(name="user", rows=9), Table(name="item", rows=12), Table(name="price", rows=1)),
    }
)
SAVED: dict[str, tuple[str, Schema, dict[str, Any]]] = {
    "adam, rows cut": ("deepfm", rich_schema(), ADAM | {"sharding": "row_wise", "l2": 0.01}),
    "adam, whole tables": ("deepfm", rich_schema(), ADAM | {"sharding": "table_wise", "l2": 0.01}),
    "ftrl beside adagrad": ("wide_deep", rich_schema(), ADAGRAD | {"linear": FTRL, "sharding": "row_wise"}),
    "a rank without tables": ("deep", ONE_TABLE, ADAM | {"sharding": "table_wise"}),
    "a rank without tables, one state": ("deep", ONE_TABLE, MOMENTUM | {"sharding": "table_wise"}),
    "fused, a rank without tables": ("deep", ONE_TABLE, ADAGRAD | {"sharding": "table_wise"}),
    "a rank without rows": ("deepfm", ONE_ROW, ADAM | {"sharding": "row_wise"}),
}


class Run:
    """A network on all ranks, and the trainer's steps on batches that are the same for any number of ranks."""

    def __init__(
        self, config: ModelConfig, embedding: dict[str, Any], *, schema: Schema, world: World, seed: int
    ) -> None:
        settings = Embedding.model_validate({"dim": 8, "init_std": 0.3} | embedding)
        self.schema, self.world = schema, world
        self.sharded = shard(network_of(config, schema, dim=8, std=0.1), settings, world=world, seed=seed)
        self.model = self.sharded.model.train()
        self.optimizer = dense_optimizer(self.model, Train(optimizer="adam", learning_rate=0.01, eps=1e-3), linear=None)
        self.task_weights_T = torch.ones(len(schema.tasks), device=world.device)

    def batch(self, step: int) -> Batch:
        """This rank's rows of a step."""
        ids_BS, floats_BN = random_rows(self.schema, ROWS, seed=50 + step)
        labels_BT = torch.randint(0, 2, (ROWS, len(self.schema.tasks)), generator=torch.Generator().manual_seed(step))
        size = ROWS // self.world.size
        own = slice(self.world.rank * size, (self.world.rank + 1) * size)
        groups_BG, real_B = torch.zeros(size, 0, dtype=torch.int64), torch.ones(size)
        labels_BT = labels_BT[own].float()
        return Batch(ids_BS[own], floats_BN[own], labels_BT, groups_BG, real_B, torch.ones_like(labels_BT), ROWS)

    def step(self, step: int) -> float:
        """The step's logloss over all ranks."""
        batch = self.batch(step).to(self.world.device)
        self.sharded.begin_step(step)
        scored = self.model(batch.ids_BS, batch.floats_BN)
        logloss, loss = mean_loss(scored, batch, task_weights_T=self.task_weights_T, ranks=self.world.size)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return mean_over_ranks(logloss)

    def logits(self) -> Tensor:
        """Of fixed rows."""
        ids_BS, floats_BN = random_rows(self.schema, 7, seed=99)
        self.model.eval()
        with torch.no_grad():
            return self.model(ids_BS.to(self.world.device), floats_BN.to(self.world.device)).logits_BT

    def held(self) -> dict[str, Any]:
        """This rank's shards of tables and states by their first row, and the head."""
        shards: dict[str, list[tuple[int, Tensor]]] = {}

        def keep(name: str, tensor: Tensor, *, first_row: int) -> None:
            shards.setdefault(name, []).append((first_row, tensor.detach().clone()))

        state = self.model.state_dict()
        head = {name: value.clone() for name, value in state.items() if not isinstance(value, ShardedTensor)}
        for name, value in state.items():
            for part in value.local_shards() if isinstance(value, ShardedTensor) else []:
                keep(name, part.tensor, first_row=part.metadata.shard_offsets[0])
        for states in self.sharded.model.fused_optimizer.state_dict()["state"].values():
            for name, value in states.items():
                for part in value.local_shards() if isinstance(value, ShardedTensor) else []:
                    first_row = part.metadata.shard_offsets[0]
                    keep(f"{name} 1", part.tensor, first_row=first_row)
                    rows = self.sharded.rows
                    if rows and rows.groups[0].second_RW is not None:
                        keep(f"{name} 2", rows.second_beside(part.tensor), first_row=first_row)
        return {"shards": shards, "head": head, "logits": self.logits()}


def neutral(kind: str) -> dict[str, Any]:
    """Settings without statistics of the batch; nothing is dropped by default."""
    return {"attention_activation": "sigmoid"} if kind == "din" else {}


def learn_every_model(world: World) -> dict[str, tuple[float, Tensor]]:
    """The first step's loss, and the logits after the third."""
    found = {}
    for at, kind in enumerate(MODELS):
        config = config_of(kind, **neutral(kind))
        run = Run(config, TABLES[at % len(TABLES)], schema=rich_schema(), world=world, seed=1)
        losses = [run.step(step) for step in BEFORE]
        found[kind] = (losses[0], run.logits())
    return found


def models_on_a_rank(folder: Path) -> None:
    quiet_libraries()
    with open_world("cpu") as world:
        torch.save(learn_every_model(world), folder / f"models-{world.rank}.pt")


def run_of(name: str, world: World, *, seed: int) -> Run:
    kind, schema, embedding = SAVED[name]
    return Run(config_of(kind, hidden=[8]), embedding, schema=schema, world=world, seed=seed)


def uninterrupted(name: str, folder: Path, *, world: World) -> dict[str, Any]:
    run = run_of(name, world, seed=1)
    for step in BEFORE:
        run.step(step)
    save(folder / f"{name} of {world.size}", run.sharded, optimizer=run.optimizer)
    losses = [run.step(step) for step in AFTER]
    return run.held() | {"losses": losses}


def continued(name: str, folder: Path, *, world: World, saved_by: int) -> dict[str, Any]:
    """From a start that is another, so that all has to come from the checkpoint."""
    run = run_of(name, world, seed=2)
    run.step(9)
    restore(folder / f"{name} of {saved_by}", run.sharded, optimizer=run.optimizer)
    losses = [run.step(step) for step in AFTER]
    return run.held() | {"losses": losses}


def checkpoints_on_a_rank(folder: Path) -> None:
    quiet_libraries()
    with open_world("cpu") as world:
        found = {}
        for name in SAVED:
            whole = uninterrupted(name, folder, world=world)
            found[name] = (whole, continued(name, folder, world=world, saved_by=1))
        torch.save(found, folder / f"checkpoints-{world.rank}.pt")


def on_two_ranks(function: str, folder: Path) -> list[Any]:
    """What each rank found."""
    run_on_two_ranks(__name__, function, folder=folder)
    what = function.split("_")[0]
    return [torch.load(folder / f"{what}-{rank}.pt", weights_only=False) for rank in range(2)]


def run_on_two_ranks(module: str, function: str, *, folder: Path) -> None:
    """A test module's function, called with the folder on each rank."""
    script = folder / "worker.py"
    script.write_text(WORKER)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), module]
    search = {"PYTHONPATH": str(ROOT)}
    line += [function, str(folder)]
    done = subprocess.run(line, cwd=ROOT, env=os.environ | search, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-8000:]


@pytest.fixture
def world() -> Iterator[World]:
    quiet_libraries()
    with open_world("cpu") as alone:
        yield alone


def test_every_model_learns_on_two_ranks_what_it_learns_on_one(tmp_path: Path, world: World) -> None:
    one, two = learn_every_model(world), on_two_ranks("models_on_a_rank", tmp_path)
    for kind, (loss, logits_BT) in one.items():
        for other_loss, others_BT in (rank[kind] for rank in two):
            assert other_loss == pytest.approx(loss, abs=1e-6), kind
            torch.testing.assert_close(others_BT, logits_BT, rtol=0, atol=1e-5, msg=kind)


def whole(ranks: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Tables, states and the head, from the shards of all ranks."""
    found: dict[str, Tensor] = dict(ranks[0]["head"])
    for name in {name for rank in ranks for name in rank["shards"]}:
        parts = sorted((part for rank in ranks for part in rank["shards"].get(name, [])), key=lambda part: part[0])
        found[name] = torch.cat([tensor for _, tensor in parts])
    return found


def same(ranks: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    found, expected = whole(ranks), whole(wanted)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)
    for rank in ranks:
        assert rank["losses"] == pytest.approx(wanted[0]["losses"], abs=1e-6)


def test_training_goes_on_with_another_number_of_ranks(tmp_path: Path, world: World) -> None:
    one = {name: uninterrupted(name, tmp_path, world=world) for name in SAVED}
    ranks = on_two_ranks("checkpoints_on_a_rank", tmp_path)
    for name, alone in one.items():
        two, from_one = ([rank[name][at] for rank in ranks] for at in range(2))
        same(two, [alone])
        same(from_one, [alone])
        same([continued(name, tmp_path, world=world, saved_by=2)], two)
    states = [name for name in whole([one["adam, rows cut"]]) if name.endswith(" 2")]
    assert len(states) == 5, states
    assert all(whole([one["adam, rows cut"]])[name].any() for name in states)


def toml(value: Any) -> str:
    """A value as TOML, tables inline."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(part)}" for key, part in value.items()) + "}"
    return "[" + ", ".join(map(toml, value)) + "]" if isinstance(value, list) else json.dumps(value)


def train_command(folder: Path, name: str) -> list[str]:
    where = ["--data", str(folder / "data"), "--run-dir", str(folder / name)]
    return [sys.executable, "-m", "recsys", "train", str(folder / "known.toml"), *where]


def test_adam_on_all_rows_gives_one_result_also_after_a_kill(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    rows = {"optimizer": "adam", "update": "all", "l2": 1e-4, "linear_l2": 1e-3, "l2_scope": "table"}
    steps = {"checkpoint_every_steps": 5, "epochs": 2}
    sections = {"train": RAW["train"] | steps, "embedding": RAW["embedding"] | rows}
    lines = [f"{key} = {toml(value)}\n" for key, value in (RAW | sections).items()]
    (tmp_path / "known.toml").write_text("".join(lines))
    results = []
    process = subprocess.Popen(train_command(tmp_path, "killed"), cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "checkpoints" / "step-5" / "complete").is_file() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "result.json").exists(), "it ended before it was killed"
    for name in ("killed", "whole"):
        done = subprocess.run(train_command(tmp_path, name), cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        results.append(json.loads((tmp_path / name / "result.json").read_text()))
    killed, alone = ({key: part for key, part in result.items() if "second" not in key} for result in results)
    assert killed == alone
    assert alone["test"]["auc"] > 0.6
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("killed", "whole")]
    logged = [
        [(record["step"], record["loss"]) for record in map(json.loads, part) if "loss" in record] for part in lines
    ]
    assert logged[0] == logged[1]
