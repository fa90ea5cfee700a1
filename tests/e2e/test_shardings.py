"""Every sharding type gives the losses of one process; a checkpoint of any loads into any other; less than fp32."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardedTensor
from torchrec.streamable import Pipelineable

from recsys.clock import Clock
from recsys.data import Batch
from recsys.loss import mean_loss
from recsys.network import Network
from recsys.parallel.exchange import AllToAll, Scatter
from recsys.parallel.pipeline import IdsAhead
from recsys.parallel.state import restore, save
from recsys.parallel.world import World, average_gradients, mean_over_ranks, open_world
from recsys.placement import COLUMN_SHARDINGS, Sharding
from recsys.progress import quiet_libraries
from tests.e2e.test_ranks import ADAGRAD, ADAM, AFTER, BEFORE, FTRL, Run, run_on_two_ranks
from tests.registry import config_of, rich_schema

pytestmark = [pytest.mark.slow, pytest.mark.dist]

ROOT = Path(__file__).parents[2]
KINDS = tuple(kind for kind in get_args(Sharding) if kind != "auto")
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "fused, a state a weight": ADAGRAD,
    "fused, a state a row": {"optimizer": "rowwise_adagrad", "learning_rate": 0.1},
    "two states": ADAM | {"l2": 0.01},
    "two optimizers": ADAGRAD | {"linear": FTRL},
    "every row at each second step": ADAM | {"l2": 0.01, "l2_scope": "table", "l2_every_steps": 2},
}
CASES = [
    (name, kind)
    for name, kind in product(OPTIMIZERS, KINDS)
    if not (name == "fused, a state a row" and kind in COLUMN_SHARDINGS)
]
PIPED = ("row_wise", "table_wise", "data_parallel")
NARROW: dict[str, dict[str, Any]] = {
    "whole": ADAGRAD | {"sharding": "row_wise"},
    "fp16, fused": ADAGRAD | {"sharding": "row_wise", "precision": "fp16"},
    "fp16, own rows": ADAM | {"sharding": "row_wise", "precision": "fp16", "l2": 0.01},
    "own rows": ADAM | {"sharding": "row_wise", "l2": 0.01},
    "fp16 sent": ADAGRAD | {"sharding": "row_wise", "forward_comm": "fp16", "backward_comm": "fp16"},
}


def run_of(settings: dict[str, Any], world: World, *, seed: int) -> Run:
    return Run(config_of("deepfm", hidden=[8]), settings, schema=rich_schema(), world=world, seed=seed)


def next_kind(name: str, kind: str) -> str:
    """Where a checkpoint comes from: the kind before, of those that the optimizer can work in."""
    kinds = [own for case, own in CASES if case == name]
    return kinds[kinds.index(kind) - 1]


def moved(folder: Path, world: World, *, saved_by: int | None) -> dict[str, Any]:
    """Losses after a checkpoint of the same run (saved_by None), or of one on so many ranks with another sharding."""
    found = {}
    for name, kind in CASES:
        settings = OPTIMIZERS[name] | {"sharding": kind}
        run = run_of(settings, world, seed=1 if saved_by is None else 2)
        if saved_by is None:
            for step in BEFORE:
                run.step(step)
            save(folder / f"{name} {kind} of {world.size}", run.sharded, optimizer=run.optimizer)
        else:
            run.step(9)
            restore(folder / f"{name} {next_kind(name, kind)} of {saved_by}", run.sharded, optimizer=run.optimizer)
        found[name, kind] = [run.step(step) for step in AFTER]
    return found


def narrow(world: World) -> dict[str, list[float]]:
    return {name: [run.step(s) for s in BEFORE] for name, own in NARROW.items() for run in [run_of(own, world, seed=1)]}


def ahead(world: World, *, shift: int = 0) -> list[Any]:
    """Losses and weights with ids sent ahead, which are those of other steps where `shift` is not 0.

    An evaluation comes after every step, while the next one's ids are under way.
    """
    found = []
    for kind in PIPED:
        run = run_of(ADAM | {"sharding": kind}, world, seed=1)
        batches = [replace(run.batch(step), ids_BS=run.batch(step + shift).ids_BS) for step in BEFORE]
        ids_ahead, losses = IdsAhead(run.sharded, clock=Clock()), []
        for _, step in zip(ids_ahead.batches(iter(batches)), BEFORE, strict=True):
            losses.append(run.step(step))
            with ids_ahead.paused():
                assert torch.isfinite(run.logits()).all()
            run.model.train()
        found.append((losses, held_by(run)))
        assert torch.isfinite(run.logits()).all()
    return found


def at_once(world: World) -> list[Any]:
    runs = [run_of(ADAM | {"sharding": kind}, world, seed=1) for kind in PIPED]
    return [([run.step(step) for step in BEFORE], held_by(run)) for run in runs]


def held_by(run: Run) -> dict[str, Any]:
    """What this rank holds of tables and states, and the head with what is replicated, bit for bit."""
    held = run.held()
    shards = {name: [(row, part.tolist()) for row, part in parts] for name, parts in held["shards"].items()}
    return shards | {name: value.tolist() for name, value in held["head"].items()}


class Piped(nn.Module):
    """The network as torchrec's pipeline takes it: the tables look up an attribute of what `forward` is given."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        network = run.model.module
        self.tables, self.rest = network.tables, Rest(network, run.task_weights_T, ranks=run.world.size)

    def forward(self, given: "Looked") -> tuple[Tensor, Tensor]:
        loss, logloss = self.rest(self.tables(given.lookups), given)
        return loss, logloss


class Rest(nn.Module):
    """What follows the lookup; its own module, into which torch.fx does not look."""

    def __init__(self, network: Network, task_weights_T: Tensor, *, ranks: int) -> None:
        super().__init__()
        self.network, self.task_weights_T, self.ranks = [network], task_weights_T, ranks

    def forward(self, pooled: Any, given: "Looked") -> tuple[Tensor, Tensor]:
        (network,), batch = self.network, given.batch
        rows_BD = network._in_order(pooled)
        scored = network.score(rows_BD, ids_BS=batch.ids_BS, floats_BN=batch.floats_BN)
        logloss, loss = mean_loss(scored, batch, task_weights_T=self.task_weights_T, ranks=self.ranks)
        return loss, logloss.detach()


@dataclass
class Looked(Pipelineable):
    """A batch and the ids of its lookup."""

    batch: Batch
    lookups: KeyedJaggedTensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "Looked":
        return self

    def record_stream(self, stream: torch.Stream) -> None: ...


def by_torchrec(world: World) -> list[Any]:
    """What `at_once` finds, by torchrec's own pipeline on the same sharded tables."""
    found = []
    for kind in PIPED:
        run = run_of(ADAM | {"sharding": kind}, world, seed=1)
        dense = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
        run.optimizer.register_step_pre_hook(lambda *given, dense=dense: average_gradients(dense))
        pipeline = TrainPipelineSparseDist(Piped(run), run.optimizer, world.device)
        batches = [run.batch(step) for step in BEFORE]
        given = iter([Looked(batch, run.model.module.lookups(batch.ids_BS)) for batch in batches])
        losses = []
        for step in BEFORE:
            run.sharded.begin_step(step)
            losses.append(mean_over_ranks(pipeline.progress(given)))
        pipeline.detach()
        found.append((losses, held_by(run)))
    return found


def check_scatter(world: World) -> None:
    """Uneven batches of the ranks, against collectives over all."""
    rows, width, group = [3, 2], 5, dist.group.WORLD
    generator = torch.Generator().manual_seed(world.rank)
    sums_GD = torch.randn(sum(rows), width, generator=generator, requires_grad=True)
    weights_BD = torch.randn(rows[world.rank], width, generator=generator)
    total_BD = Scatter(group)(sums_GD, input_splits=rows).wait()
    (total_BD * weights_BD).sum().backward()
    wanted_GD, gradients = sums_GD.detach().clone(), [torch.empty(size, width) for size in rows]
    dist.all_reduce(wanted_GD)
    assert torch.equal(total_BD, wanted_GD.split(rows)[world.rank])
    for rank, gradient_BD in enumerate(gradients):
        gradient_BD.copy_(weights_BD if rank == world.rank else 0)
        dist.broadcast(gradient_BD, src=rank)
    assert torch.equal(torch.as_tensor(sums_GD.grad), torch.cat(gradients) / world.size)


def check_all_to_all(world: World, *, widths: list[int]) -> None:
    """Uneven batches and widths of the ranks, of which one may look up nothing, against a gather of everything."""
    rows, group = [3, 2], dist.group.WORLD
    looked = [torch.randn(sum(rows), width, generator=torch.Generator().manual_seed(9)) for width in widths]
    own_GD = looked[world.rank].clone().requires_grad_()
    joined_BD = AllToAll(group, widths=widths)(own_GD, batch_size_per_rank=rows).wait()
    assert torch.equal(joined_BD, torch.cat(looked, dim=1).split(rows)[world.rank])
    weights_GD = torch.randn(sum(rows), sum(widths), generator=torch.Generator().manual_seed(3))
    (joined_BD * weights_GD.split(rows)[world.rank]).sum().backward()
    wanted_GD = weights_GD.split(widths, dim=1)[world.rank] / world.size
    assert torch.equal(torch.as_tensor(own_GD.grad), wanted_GD)


def on_a_rank(folder: Path) -> None:
    quiet_libraries()
    with open_world("cpu") as world:
        found = (moved(folder, world, saved_by=None), moved(folder, world, saved_by=1), narrow(world))
        check_scatter(world)
        for widths in ([5, 7], [4, 0], [0, 4]):
            check_all_to_all(world, widths=widths)
        assert at_once(world) == ahead(world) == by_torchrec(world) != ahead(world, shift=7)
        torch.save(found, folder / f"found-{world.rank}.pt")


@pytest.fixture
def world() -> Iterator[World]:
    quiet_libraries()
    with open_world("cpu") as alone:
        yield alone


def test_losses_do_not_depend_on_the_sharding() -> None:
    line = [sys.executable, "benchmarks/sharding.py", "--quick"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["cells"] == 3 * (9 * 6 - 3), done.stdout
    assert figures["largest_difference"] < 1e-6, done.stdout


def test_a_checkpoint_of_any_sharding_loads_into_any_other(tmp_path: Path, world: World) -> None:
    one = moved(tmp_path, world, saved_by=None)
    run_on_two_ranks(__name__, "on_a_rank", folder=tmp_path)
    two, from_one, less = torch.load(tmp_path / "found-0.pt", weights_only=False)
    from_two = moved(tmp_path, world, saved_by=2)
    for case, losses in one.items():
        for others in (two, from_one, from_two):
            assert others[case] == pytest.approx(losses, abs=1e-6), case
    for name, losses in narrow(world).items():
        assert less[name] == pytest.approx(losses, abs=2e-3), name
    for name, full in (("fp16, fused", "whole"), ("fp16, own rows", "own rows"), ("fp16 sent", "whole")):
        assert less[name] == pytest.approx(less[full], abs=5e-3) and less[name] != less[full], name


def test_a_lone_process_learns_the_same_with_ids_sent_ahead(world: World) -> None:
    assert at_once(world) == ahead(world) == by_torchrec(world) != ahead(world, shift=7)


def test_fp16_tables_are_kept_in_two_bytes(world: World) -> None:
    run = run_of(NARROW["fp16, fused"], world, seed=1)
    tables = [value for value in run.model.state_dict().values() if isinstance(value, ShardedTensor)]
    assert tables and all(shard.tensor.dtype == torch.float16 for table in tables for shard in table.local_shards())
