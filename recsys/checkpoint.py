"""Checkpoints of a run: `checkpoints/step-N/`, valid once its marker `complete` is there, newest and best kept.

There is no generator state in them: randomness is drawn anew from (seed, step, rank) before each step, so going on from
step N draws what the uninterrupted run drew.
"""

import shutil
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter
from torch.optim import Optimizer

from etl.artifact import read_json, write_json, write_text
from etl.faults import Fault
from recsys.parallel.shard import Sharded
from recsys.parallel.state import save
from recsys.parallel.world import World, barrier

_MARKER = "complete"


class Progress(BaseModel):
    """Where training stands. `position` counts the epoch's rows taken by all ranks, `rows` those of the whole run.

    `without_gain` counts evaluations since the best one, `cuts` how often the learning rates were lowered and
    `since_cut` evaluations without a gain since the last time.
    """

    model_config = ConfigDict(frozen=True)

    seed: int
    step: int = 0
    epoch: int = 0
    position: int = 0
    rows: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_step: int = 0
    without_gain: int = 0
    cuts: int = 0
    since_cut: int = 0
    finished: bool = False


def latest(run: Path) -> tuple[Path, Progress] | None:
    """The newest valid checkpoint, if there is one."""
    valid = _valid(run)
    return (valid[-1], read_progress(valid[-1])) if valid else None


def best(run: Path) -> Path:
    """The checkpoint with the best validation figure. Raises Fault where the run has none."""
    newest = latest(run)
    folder = run / "checkpoints" / f"step-{newest[1].best_step}" if newest else run / "checkpoints"
    if not (folder / _MARKER).is_file():
        remedy = "train first: python -m recsys train EXP.toml"
        raise Fault(str(folder), got="no complete checkpoint", wanted="that of the best evaluation", remedy=remedy)
    return folder


def read_progress(folder: Path) -> Progress:
    """`progress.json` of a checkpoint."""
    raw = read_json(folder / "progress.json", remedy="delete this checkpoint and train on from the one before")
    return TypeAdapter(Progress).validate_python(raw)


def save_checkpoint(
    run: Path, progress: Progress, *, sharded: Sharded, optimizer: Optimizer, world: World, keep: int
) -> None:
    """All ranks write their shards beside the place, rank 0 moves the whole there and drops what is too old."""
    folder = run / "checkpoints" / f"step-{progress.step}"
    beside = folder.with_name(f".{folder.name}.partial")
    if world.rank == 0:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    barrier()
    save(beside, sharded, optimizer=optimizer)
    barrier()
    if world.rank == 0:
        write_json(beside / "progress.json", progress.model_dump())
        write_text(beside / _MARKER, "")
        shutil.rmtree(folder, ignore_errors=True)
        beside.replace(folder)
        _drop(run, keep=keep, best_step=progress.best_step)
    barrier()


def _valid(run: Path) -> list[Path]:
    folders = [path for path in (run / "checkpoints").glob("step-*") if (path / _MARKER).is_file()]
    return sorted(folders, key=_step)


def _drop(run: Path, *, keep: int, best_step: int) -> None:
    for folder in _valid(run)[:-keep]:
        if _step(folder) != best_step:
            shutil.rmtree(folder)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
