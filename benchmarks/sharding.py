"""What sharding changes: nothing in the losses, and how much in the time of a step.

Equality: 20 steps of DeepFM on random rows, on a single process with plain torch tables and gradients, and with every
sharding type on 1, 2 and 4 ranks (4: two hosts of two, by what the ranks are told) and every optimizer. The table shows
the largest difference of a loss over the steps.

Cost: the same global batch on 2 ranks of one thread each and on 1 rank of two threads, in turns; bf16 where it is fast.

The last line is a JSON object: `cells`, `largest_difference`, and with the cost `ranks_over_threads` of each sharding.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from etl.experiment_file import parse
from etl.schema import DenseFeature, IdFeature, Schema, Table, TaskColumn
from recsys.clock import Clock
from recsys.data import Batch
from recsys.experiment import Experiment, Train
from recsys.learner import dense_optimizer
from recsys.loss import mean_loss
from recsys.machine import keep_memory, slow_precision
from recsys.network import Network, build_network, init_rows
from recsys.optim import start_states, state_count, update
from recsys.parallel.pipeline import IdsAhead
from recsys.parallel.shard import Sharded, shard
from recsys.parallel.world import World, mean_over_ranks, open_world
from recsys.placement import COLUMN_SHARDINGS, Sharding
from recsys.progress import quiet_libraries

SHARDINGS = (*get_args(Sharding), "mixed")
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"learning_rate": 0.1},
    "momentum": {"learning_rate": 0.1},
    "adagrad": {"learning_rate": 0.1, "accumulator_start": 0.01},
    "rowwise_adagrad": {"learning_rate": 0.1},
    "adam": {"learning_rate": 0.05, "eps": 1e-3},
    "ftrl": {"learning_rate": 0.1, "accumulator_start": 0.1},
}
MIXED = ("table_wise", "row_wise", "data_parallel", "table_row_wise")
STEPS, QUICK_STEPS, WORLDS, TURNS = 20, 5, (1, 2, 4), 4
SMALL = {"user": 90, "item": 40, "tag": 7, "city": 2, "pair": 300}
WIDE = {f"C{at}": 10 ** (2 + at % 5) for at in range(26)}


def schema_of(rows: dict[str, int], *, dense: int) -> Schema:
    """Single ids; `tag` has up to three, and `pair` a first-order weight alone."""
    features = tuple(
        IdFeature(name=name, type="bag", table=name, linear_only=False, slots=3, dtype="list<int64>")
        if name == "tag"
        else IdFeature(name=name, type="categorical", table=name, linear_only=name == "pair")
        for name in rows
    )
    return Schema(
        features=features,
        dense=tuple(DenseFeature(name=f"x{at}") for at in range(dense)),
        tables=tuple(Table(name=name, rows=count) for name, count in rows.items()),
        tasks=(TaskColumn(name="click", positive_rate=0.5),),
    )


def experiment_of(schema: Schema, embedding: dict[str, Any], *, hidden: list[int]) -> Experiment:
    raw = {
        "name": "sharding",
        "data": {"train": ["a.csv"], "valid": ["b.csv"], "test": ["c.csv"]},
        "features": [
            {"type": "bag", "name": "tag", "max_length": 3}
            if feature.type == "bag"
            else {"type": "categorical", "columns": [feature.name], "linear_only": feature.linear_only}
            for feature in schema.features
        ]
        + [{"type": "numeric", "columns": schema.dense_names}],
        "tasks": [{"name": "click"}],
        "model": {"kind": "deepfm", "hidden": hidden},
        "train": {"optimizer": "adam", "learning_rate": 0.01, "eps": 1e-3},
        "embedding": embedding,
    }
    return parse(raw, place="benchmarks/sharding.py", into=Experiment)


def global_batch(schema: Schema, rows: int, *, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids [B, S], floats [B, N] and labels [B, 1] of one step over all ranks."""
    generator = torch.Generator().manual_seed(step)
    columns = []
    for feature in schema.features:
        power = torch.rand(rows, feature.slots, generator=generator) ** 3  # some rows are much hotter than others
        ids_BL = (power * schema.rows(feature.table)).long()
        if feature.slots > 1:
            lengths_B1 = torch.randint(0, feature.slots + 1, (rows, 1), generator=generator)
            ids_BL = torch.where(torch.arange(feature.slots) < lengths_B1, ids_BL, -1)
        columns.append(ids_BL)
    floats_BN = torch.randn(rows, len(schema.dense), generator=generator)
    return torch.cat(columns, dim=1), floats_BN, torch.randint(0, 2, (rows, 1), generator=generator).float()


def rank_batch(schema: Schema, rows: int, *, step: int, rank: int, ranks: int) -> Batch:
    own = slice(rank * rows // ranks, (rank + 1) * rows // ranks)
    ids_BS, floats_BN, labels_BT = (part[own] for part in global_batch(schema, rows, step=step))
    none_BG, real_B = ids_BS[:, :0], torch.ones(len(ids_BS))
    return Batch(ids_BS, floats_BN, labels_BT, none_BG, real_B, torch.ones_like(labels_BT), global_rows=rows)


class Plain:
    """One process, tables as plain torch modules: autograd gives their gradients, `recsys.optim` moves touched rows."""

    def __init__(self, experiment: Experiment, schema: Schema) -> None:
        self.embedding = experiment.embedding
        self.network = build_network(experiment, schema, table_device="cpu").train()
        self.dense = dense_optimizer(self.network, experiment.train, linear=None)
        self.states: dict[str, list[Tensor]] = {}
        for name, weight_RW in self._tables():
            shape = (len(weight_RW), 1) if self.embedding.rowwise else weight_RW.shape
            self.states[name] = [torch.zeros(shape) for _ in range(state_count(self.embedding))]
            start_states(self.embedding, weight_RW.detach(), states=self.states[name])

    def step(self, batch: Batch, *, step: int) -> float:
        scored = self.network(batch.ids_BS, batch.floats_BN)
        logloss, loss = mean_loss(scored, batch, task_weights_T=torch.ones(1), ranks=1)
        self.network.zero_grad()
        loss.backward()
        self.dense.step()
        lookups = self.network.lookups(batch.ids_BS).to_dict()
        for name, weight_RW in self._tables():
            slots = [slot for slot, table in self.network.layout.slots if table == name]
            touched = torch.unique(torch.cat([lookups[slot].values() for slot in slots]))
            weights, states = weight_RW.detach()[touched], [state[touched] for state in self.states[name]]
            update(self.embedding, weights, gradients=weight_RW.grad[touched], states=states, step=step)
            weight_RW.detach()[touched] = weights
            for kept, state in zip(self.states[name], states, strict=True):
                kept[touched] = state
        return logloss.item()

    def _tables(self) -> list[tuple[str, Tensor]]:
        return [(name, module.weight) for name, module in self.network.tables.embedding_bags.items()]


class Ranks:
    """The trainer's own step."""

    def __init__(self, experiment: Experiment, schema: Schema, *, world: World, bf16: bool = False) -> None:
        network = build_network(experiment, schema, table_device="meta")
        self.sharded: Sharded = shard(network, experiment.embedding, world=world, seed=experiment.seed)
        self.model, self.world, self.bf16 = self.sharded.model.train(), world, bf16
        self.dense = dense_optimizer(self.model, experiment.train, linear=None)

    def step(self, batch: Batch, *, step: int) -> Tensor:
        self.sharded.begin_step(step)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
            scored = self.model(batch.ids_BS, batch.floats_BN)
        logloss, loss = mean_loss(scored, batch, task_weights_T=torch.ones(1), ranks=self.world.size)
        self.dense.zero_grad()
        loss.backward()
        self.dense.step()
        return logloss.detach()


def fill(network: Network, experiment: Experiment) -> None:
    """The rows that sharded tables start with."""
    for at, (_, table) in enumerate(network.layout.slots):
        vector = experiment.embedding.dim if at < network.layout.vectors else 0
        weight = network.tables.embedding_bags[table].weight.detach()
        std, seed = experiment.embedding.init_std, experiment.seed
        init_rows(weight, table=table, first_row=0, vector=vector, std=std, seed=seed)


def embedding_of(optimizer: str, sharding: str, *, rows: dict[str, int], dim: int) -> dict[str, Any]:
    tables = {name: {"sharding": MIXED[at % len(MIXED)]} for at, name in enumerate(rows)}
    chosen = {"tables": tables} if sharding == "mixed" else {"sharding": sharding}
    return {"dim": dim, "init_std": 0.1, "optimizer": optimizer} | OPTIMIZERS[optimizer] | chosen


def losses_on_ranks(steps: int) -> dict[str, list[float]]:
    """Every sharding with every optimizer, on all ranks."""
    schema, found = schema_of(SMALL, dense=2), {}
    with open_world("cpu") as world:
        for sharding, optimizer in product(SHARDINGS, OPTIMIZERS):
            if sharding in COLUMN_SHARDINGS and optimizer == "rowwise_adagrad":
                continue  # refused
            embedding = embedding_of(optimizer, sharding, rows=SMALL, dim=8)
            run = Ranks(experiment_of(schema, embedding, hidden=[16]), schema, world=world)
            batches = (rank_batch(schema, 64, step=at + 1, rank=world.rank, ranks=world.size) for at in range(steps))
            losses = [mean_over_ranks(run.step(batch, step=at)) for at, batch in enumerate(batches, start=1)]
            found[f"{sharding} {optimizer}"] = losses
    return found


def losses_alone(steps: int) -> dict[str, list[float]]:
    schema, found = schema_of(SMALL, dense=2), {}
    for optimizer in OPTIMIZERS:
        embedding = embedding_of(optimizer, "auto", rows=SMALL, dim=8)
        experiment = experiment_of(schema, embedding, hidden=[16])
        run = Plain(experiment, schema)
        fill(run.network, experiment)
        batches = (rank_batch(schema, 64, step=at + 1, rank=0, ranks=1) for at in range(steps))
        found[optimizer] = [run.step(batch, step=at) for at, batch in enumerate(batches, start=1)]
    return found


def step_seconds(sharding: str, *, rounds: int) -> dict[str, float]:
    """Medians of DeepFM on 26 tables, 4096 rows over all ranks; on several ranks also with ids sent ahead, in turns."""
    keep_memory()  # as `recsys train`
    schema, embedding = schema_of(WIDE, dense=13), embedding_of("rowwise_adagrad", sharding, rows=WIDE, dim=16)
    experiment = experiment_of(schema, embedding, hidden=[400, 400, 400])
    with open_world("cpu") as world:
        run = Ranks(experiment, schema, world=world, bf16=slow_precision(Train(precision="bf16")) is None)
        batches = [rank_batch(schema, 4096, step=at, rank=world.rank, ranks=world.size) for at in range(4)]
        ahead: Any = IdsAhead(run.sharded, clock=Clock()).batches
        sides = {"plain": iter, "ahead": ahead} if world.size > 1 else {"plain": iter}
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for turn, (side, taken) in product(range(TURNS), sides.items()):
            ends = []
            for at, batch in enumerate(taken(batches[at % 4] for at in range(rounds))):
                run.step(batch, step=turn * rounds + at + 1)
                ends.append(time.perf_counter())
            seconds[side] += [end - begin for begin, end in pairwise(ends)] if turn else []
    return {side: median(found) for side, found in seconds.items()}


def on_ranks(ranks: int, *, threads: int, arguments: list[str]) -> Any:
    """What rank 0 of this script's own processes found."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        command += [__file__, "--worker", str(out), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{ranks} ranks: {done.stderr[-4000:]}")
        return json.loads(out.read_text())


def equality(steps: int) -> dict[str, Any]:
    """Prints the table; the figures of all cells."""
    alone, cells = losses_alone(steps), {}
    for ranks in WORLDS:
        for name, losses in on_ranks(ranks, threads=1, arguments=["--steps", str(steps)]).items():
            sharding, optimizer = name.split()
            cells[sharding, ranks, optimizer] = max(abs(a - b) for a, b in zip(losses, alone[optimizer], strict=True))
    print(f"| sharding | ranks | {' | '.join(OPTIMIZERS)} |\n|{'---|' * (2 + len(OPTIMIZERS))}")
    for sharding, ranks in product(SHARDINGS, WORLDS):
        shown = [cells.get((sharding, ranks, optimizer)) for optimizer in OPTIMIZERS]
        texts = ["refused" if value is None else f"{value:.0e}" for value in shown]
        print(f"| {sharding} | {ranks} | {' | '.join(texts)} |")
    fell = {optimizer: losses[-1] - losses[0] for optimizer, losses in alone.items()}
    print(f"loss after {steps} steps less the first: {', '.join(f'{name} {fall:+.3f}' for name, fall in fell.items())}")
    return {"cells": len(cells), "largest_difference": max(cells.values())}


def cost(rounds: int) -> dict[str, float]:
    """2 ranks of one thread over 1 rank of two threads, in turns."""
    found = {}
    for sharding in ("table_wise", "row_wise"):
        line = ["--cost", sharding, "--steps", str(rounds)]
        turns = [[on_ranks(ranks, threads=2 // ranks, arguments=line) for ranks in (1, 2)] for _ in range(3)]
        for name, side in (("", "plain"), (", ids ahead", "ahead")):
            found[sharding + name] = median(two[side] / one["plain"] for one, two in turns)
        print(f"{sharding}, ms a step of 1 rank x 2 threads, of 2 ranks x 1 thread, and of those with ids sent ahead:")
        print([[round(side * 1e3) for side in (one["plain"], *two.values())] for one, two in turns])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps, and no cost")
    parser.add_argument("--only", choices=("equality", "cost"), help="one of the two")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--cost", help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet_libraries()
    if options.worker:
        if os.environ["WORLD_SIZE"] == "4":
            os.environ["LOCAL_WORLD_SIZE"] = "2"
        kind, n = options.cost, options.steps
        found: Any = step_seconds(kind, rounds=n) if kind else losses_on_ranks(n)
        if os.environ["RANK"] == "0":
            options.worker.write_text(json.dumps(found))
        return
    figures = equality(QUICK_STEPS if options.quick else STEPS) if options.only != "cost" else {}
    if options.only == "cost" or not (options.quick or options.only):
        figures["ranks_over_threads"] = cost(rounds=8)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
