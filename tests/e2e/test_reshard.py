"""A run that N ranks began and M ranks go on with, for N and M from 1 to 4: every row once, and the same weights."""

import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch
from torch import Tensor

from recsys.checkpoint import Checkpoints, latest
from recsys.data import Batch
from recsys.learner import Learner
from recsys.parallel.state import read_tensors
from recsys.parallel.world import open_world
from recsys.placement import Sharding
from recsys.progress import quiet_libraries
from recsys.train import Trainer
from tests.e2e.test_ranks import ADAGRAD, ADAM, FTRL, ROOT
from tests.recsys.conftest import SCHEMA, SPLITS, experiment, write_dataset

pytestmark = [pytest.mark.slow, pytest.mark.dist]

SIZES = (1, 2, 3, 4)
STEP_ROWS, STOP = 1032, 3
"""The epoch is five whole steps and one that is not full."""
KINDS = tuple(kind for kind in get_args(Sharding) if kind != "auto")
BY_HOST = ("grid_shard", "table_column_wise", "table_row_wise")
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "two states": ADAM | {"l2": 0.01},
    "two optimizers": ADAGRAD | {"linear": FTRL},
}


class Leg(NamedTuple):
    """Half an epoch, or the whole one where it is `alone`: by so many ranks, from what so many others saved."""

    optimizer: str
    size: int
    saved_by: int | None
    kind: str
    alone: bool = False

    @property
    def name(self) -> str:
        return f"{self.optimizer}, {self.saved_by or ('alone' if self.alone else 'first')} to {self.size}"


def legs() -> Iterator[Leg]:
    """What one process and what each number of ranks begin, and each pair with the next optimizer and sharding."""
    for shift, name in enumerate(OPTIMIZERS):
        yield Leg(name, 1, None, "table_wise", alone=True)
        for size in SIZES:
            yield Leg(name, size, None, kind_of(size, at=size + 2 * shift))
    for at, (saved_by, size) in enumerate(product(SIZES, SIZES)):
        yield Leg(list(OPTIMIZERS)[(saved_by + size) % 2], size, saved_by, kind_of(size, at=at))


def kind_of(size: int, *, at: int) -> str:
    """Four ranks are two hosts, and cut by them."""
    kinds = BY_HOST if size == 4 else KINDS
    return kinds[at % len(kinds)]


class Watched(Trainer):
    """Notes which rows it has learned from."""

    def step(self, batch: Batch) -> None:
        super().step(batch)
        assert batch.numbers_B is not None
        self.seen = [*getattr(self, "seen", []), batch.numbers_B[batch.real_B > 0]]


def learn(leg: Leg, *, rank: int, folder: Path) -> None:
    run = folder / leg.name
    if leg.saved_by and rank == 0:
        shutil.copytree(folder / Leg(leg.optimizer, leg.saved_by, None, "").name, run)
    train = {"batch_size": STEP_ROWS // leg.size, "epochs": 1, "checkpoint_every_steps": STOP, "eps": 1e-3}
    embedding = OPTIMIZERS[leg.optimizer] | {"sharding": leg.kind}
    settings = experiment(train=train, embedding=embedding, model={"kind": "deepfm", "hidden": [8], "keep_prob": 1.0})
    with open_world("cpu") as world, Checkpoints(run, world=world, keep=2) as checkpoints:
        learner = Learner(settings, SCHEMA, world=world)
        where = {"data": folder / "data", "checkpoints": checkpoints, "learner": learner, "report": lambda line: None}
        trainer = Watched(settings, SCHEMA, **where)
        run.mkdir(exist_ok=True)
        trainer.resume()
        assert trainer.progress.step == (STOP if leg.saved_by else 0)
        for batch in trainer.rest_of_epoch():
            trainer.step(batch)
            trainer.save_if_due()
            if trainer.progress.step == STOP and not leg.alone:
                break
        else:
            trainer.end_epoch()
    torch.save(torch.cat(trainer.seen), run / f"seen-{leg.saved_by}-{rank}.pt")


def as_rank(leg: Leg, *, rank: int, folder: Path, port: int) -> None:
    quiet_libraries()
    local = 2 if leg.size == 4 else leg.size
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank % local), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "WORLD_SIZE": str(leg.size), "LOCAL_WORLD_SIZE": str(local)}
    learn(leg, rank=rank, folder=folder)


def learn_all(folder: Path) -> None:
    """Each leg's ranks are forked from a process that has loaded torch: one import instead of a hundred."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.e2e.test_reshard"])
    for leg in legs():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        own = {"folder": folder, "port": port}
        ranks = [context.Process(target=as_rank, args=(leg,), kwargs=own | {"rank": at}) for at in range(leg.size)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        assert [rank.exitcode for rank in ranks] == [0] * leg.size, leg


def seen(leg: Leg, folder: Path) -> Tensor:
    """The rows of all ranks, those of before the change among them."""
    found = [torch.load(path) for path in (folder / leg.name).glob("seen-*.pt")]
    return torch.cat(found).sort().values


def test_any_number_of_ranks_goes_on_from_any_other(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    line = "import sys, pathlib; from tests.e2e import test_reshard as t; t.learn_all(pathlib.Path(sys.argv[1]))"
    own = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", line, str(tmp_path)], cwd=ROOT, env=own, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]
    for leg in legs():
        if leg.saved_by:
            check(leg, tmp_path)


def check(leg: Leg, folder: Path) -> None:
    quiet_libraries()
    assert torch.equal(seen(leg, folder), torch.arange(SPLITS["train"])), leg
    newest, wanted = latest(folder / leg.name), latest(folder / Leg(leg.optimizer, 1, None, "", alone=True).name)
    assert newest and wanted and newest[1].finished and newest[1].step == wanted[1].step == 6, leg
    found, alone = read_tensors(newest[0]), read_tensors(wanted[0])
    assert found.keys() == alone.keys(), leg
    for name, tensor in alone.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=f"{name} of {leg}")
