"""Every sharding type gives the losses of one process; a checkpoint of any loads into any other; less than fp32."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec.distributed.types import ShardedTensor

from recsys.data import Batch
from recsys.parallel.pipeline import IdsAhead
from recsys.parallel.state import restore, save
from recsys.parallel.world import World, open_world
from recsys.progress import quiet_libraries
from tests.e2e.test_ranks import ADAGRAD, ADAM, AFTER, BEFORE, FTRL, ROWS, Run
from tests.registry import config_of, random_rows, rich_schema

pytestmark = [pytest.mark.slow, pytest.mark.dist]

ROOT = Path(__file__).parents[2]
WORKER = (
    "import sys; from pathlib import Path; from tests.e2e import test_shardings as t; t.on_a_rank(Path(sys.argv[1]))"
)
KINDS = ("table_wise", "row_wise", "column_wise", "table_row_wise", "grid_shard", "data_parallel")
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "fused, a state a weight": ADAGRAD,
    "fused, a state a row": {"optimizer": "rowwise_adagrad", "learning_rate": 0.1},
    "two states": ADAM | {"l2": 0.01},
    "two optimizers": ADAGRAD | {"linear": FTRL},
}
CASES = [
    (name, kind)
    for name, kind in product(OPTIMIZERS, KINDS)
    if not (name == "fused, a state a row" and kind in ("column_wise", "grid_shard"))
]
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


def ahead(world: World, *, shift: int = 0) -> list[list[float]]:
    """Losses with ids sent ahead, which are those of other steps where `shift` is not 0."""
    found = []
    for kind in ("row_wise", "table_wise", "data_parallel"):
        run = run_of(ADAM | {"sharding": kind}, world, seed=1)
        size = ROWS // world.size
        own = slice(world.rank * size, (world.rank + 1) * size)
        rows = [random_rows(run.schema, ROWS, seed=50 + step + shift) for step in BEFORE]
        batches = [Batch(ids[own], floats[own], *[torch.ones(size, 1)] * 4, ROWS) for ids, floats in rows]
        sent = IdsAhead(run.sharded).batches(iter(batches))
        found.append([run.step(step) for _, step in zip(sent, BEFORE, strict=True)])
        assert torch.isfinite(run.logits()).all()
    return found


def at_once(world: World) -> list[list[float]]:
    runs = [run_of(ADAM | {"sharding": kind}, world, seed=1) for kind in ("row_wise", "table_wise", "data_parallel")]
    return [[run.step(step) for step in BEFORE] for run in runs]


def on_a_rank(folder: Path) -> None:
    quiet_libraries()
    with open_world("cpu") as world:
        found = (moved(folder, world, saved_by=None), moved(folder, world, saved_by=1), narrow(world))
        assert ahead(world) == at_once(world) != ahead(world, shift=7)
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
    assert figures["cells"] == 3 * (8 * 6 - 3), done.stdout
    assert figures["largest_difference"] < 1e-6, done.stdout


def test_a_checkpoint_of_any_sharding_loads_into_any_other(tmp_path: Path, world: World) -> None:
    one = moved(tmp_path, world, saved_by=None)
    (tmp_path / "worker.py").write_text(WORKER)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    line += [str(tmp_path / "worker.py"), str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-8000:]
    two, from_one, less = torch.load(tmp_path / "found-0.pt", weights_only=False)
    from_two = moved(tmp_path, world, saved_by=2)
    for case, losses in one.items():
        for others in (two, from_one, from_two):
            assert others[case] == pytest.approx(losses, abs=1e-6), case
    for name, losses in narrow(world).items():
        assert less[name] == pytest.approx(losses, abs=2e-3), name
    for name, full in (("fp16, fused", "whole"), ("fp16, own rows", "own rows"), ("fp16 sent", "whole")):
        assert less[name] == pytest.approx(less[full], abs=5e-3) and less[name] != less[full], name


def test_fp16_tables_are_kept_in_two_bytes(world: World) -> None:
    run = run_of(NARROW["fp16, fused"], world, seed=1)
    tables = [value for value in run.model.state_dict().values() if isinstance(value, ShardedTensor)]
    assert tables and all(shard.tensor.dtype == torch.float16 for table in tables for shard in table.local_shards())
