"""Checkpoints of a run: `checkpoints/step-N/`, valid once its marker `complete` is there, newest and best kept.

The marker lists the other files with their sizes and SHA-256. There is no generator state in a checkpoint: randomness
is drawn anew from (seed, step, rank) before each step, so going on from step N draws what the uninterrupted run drew.
"""

import logging
import shutil
import threading
from pathlib import Path
from types import TracebackType

from pydantic import BaseModel, ConfigDict, TypeAdapter
from torch.optim import Optimizer

from etl.artifact import read_json, sha256, write_json
from etl.faults import Fault
from recsys.parallel.shard import Sharded
from recsys.parallel.state import State, in_place, snapshot, write
from recsys.parallel.world import World, background_group, barrier, from_all, from_first

_MARKER = "complete"
_DAMAGED = "damaged-"
_ABANDONED_AFTER_S = 10.0


class Progress(BaseModel):
    """Where training stands. `position` counts the epoch's rows taken by all ranks, `rows` those of the whole run.

    `steps_before` are those that the tables' optimizer states had seen where this run took them from another one.
    `without_gain` counts evaluations since the best one, `cuts` how often the learning rates were lowered and
    `since_cut` evaluations without a gain since the last time. `usual_loss` is rank 0's running mean;
    `loss_sum` the sum of the losses of `loss_steps` steps that are in no line of metrics.jsonl yet.
    """

    model_config = ConfigDict(frozen=True)

    seed: int
    step: int = 0
    steps_before: int = 0
    epoch: int = 0
    position: int = 0
    rows: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_step: int = 0
    without_gain: int = 0
    cuts: int = 0
    since_cut: int = 0
    usual_loss: float | None = None
    loss_sum: float = 0.0
    loss_steps: int = 0
    finished: bool = False


class _File(BaseModel):
    """A file of a checkpoint, as it was written."""

    bytes: int
    sha256: str


def latest(run: Path) -> tuple[Path, Progress] | None:
    """The newest complete checkpoint, if there is one."""
    valid = _complete(run)
    return (valid[-1], read_progress(valid[-1])) if valid else None


def best(run: Path) -> Path:
    """The checkpoint with the best validation figure. Raises Fault where the run has none."""
    newest = latest(run)
    folder = _step_folder(run, newest[1].best_step) if newest else run / "checkpoints"
    if not (folder / _MARKER).is_file():
        remedy = "train first: python -m recsys train EXP.toml"
        raise Fault(str(folder), got="no complete checkpoint", wanted="that of the best evaluation", remedy=remedy)
    return folder


def refuse_damaged(folder: Path, *, world: World) -> None:
    """Raises Fault where a file of this rank's share of a checkpoint is not as it was written."""
    if harm := _harm(folder, share=world):
        raise Fault(str(folder), got=harm, wanted="the files as written", remedy="restore them, or name another run")


def read_progress(folder: Path) -> Progress:
    """`progress.json` of a checkpoint."""
    raw = read_json(folder / "progress.json", remedy="delete this checkpoint and train on from the one before")
    return TypeAdapter(Progress).validate_python(raw)


class Checkpoints:
    """Those of one run, on a file system that all ranks share: written while training goes on, verified when read."""

    def __init__(self, run: Path, *, world: World, keep: int) -> None:
        self.run, self._world, self._keep = run, world, keep
        self._group = background_group()
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.wait()
        elif self._writer:  # a connection must not be closed under it
            self._writer.join(_ABANDONED_AFTER_S)

    def save(self, progress: Progress, *, sharded: Sharded, optimizer: Optimizer) -> None:
        """Copies this rank's share into host memory and returns; a thread writes it. Waits for the write before.

        The last one of a run is written from where it lies: nothing moves any more, and a copy would double the memory.
        """
        self.wait()
        take = in_place if progress.finished else snapshot
        task = (progress, take(sharded, optimizer=optimizer))
        self._writer = threading.Thread(target=self._write, args=task, name="checkpoint", daemon=True)
        self._writer.start()
        if progress.finished:
            self.wait()

    def wait(self) -> None:
        """Until the last one is written. Raises what went wrong with it."""
        if self._writer:
            self._writer.join()
            self._writer = None
        if self._error:
            raise RuntimeError(f"no checkpoint was written: {self._error}") from self._error

    def newest(self) -> tuple[Path, Progress] | None:
        """The newest one that is whole, as its best one is; damaged ones on the way there are put aside."""
        for folder in from_first(list(reversed(_complete(self.run)))):
            harm = next(filter(None, from_all(self._harm(folder))), None)
            if harm is None:
                return folder, read_progress(folder)
            barrier()
            if self._world.rank == 0:
                aside = folder.with_name(f"{_DAMAGED}{folder.name}")
                logging.getLogger(__name__).warning("%s; put aside as %s, going on from the one before", harm, aside)
                shutil.rmtree(aside, ignore_errors=True)
                folder.replace(aside)
            barrier()
        return None

    def _harm(self, folder: Path) -> str | None:
        """What is wrong with this rank's share of the files of a checkpoint and of the best one by then."""
        try:
            if found := _harm(folder, share=self._world):
                return found
            step = read_progress(folder).best_step
            return _harm(_step_folder(self.run, step), share=self._world) if step else None
        except (Fault, ValueError) as error:
            return f"{folder}: {error}"

    def _write(self, progress: Progress, state: State) -> None:
        try:
            self._write_all(progress, state)
        except BaseException as error:  # those of torch's checkpoints are no Exception
            self._error = error

    def _write_all(self, progress: Progress, state: State) -> None:
        """All ranks write beside the place, rank 0 moves the whole there and drops what is too old."""
        folder = _step_folder(self.run, progress.step)
        beside = folder.with_name(f".{folder.name}.partial")
        first = self._world.rank == 0
        if first:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        from_first(None, group=self._group)
        write(beside, state, group=self._group)
        if first:
            write_json(beside / "progress.json", progress.model_dump())
        mine = {path.name: _described(path) for path in beside.iterdir() if _owner(path) == self._world.rank}
        of_ranks = from_all(mine, group=self._group)
        if first:
            write_json(
                beside / _MARKER, {"files": {name: about for files in of_ranks for name, about in files.items()}}
            )
            shutil.rmtree(folder, ignore_errors=True)  # what an older process left of one that it dropped
            beside.replace(folder)
            _drop(self.run, keep=self._keep, best_step=progress.best_step)
        from_first(None, group=self._group)


def _described(path: Path) -> dict[str, int | str]:
    return _File(bytes=path.stat().st_size, sha256=sha256(path)).model_dump()


def _owner(path: Path) -> int:
    """The rank that wrote a file: `__R_N.distcp` is that of rank R, all else of rank 0."""
    return int(path.name.split("_")[2]) if path.name.startswith("__") else 0


def _harm(folder: Path, *, share: World) -> str | None:
    """The first file of this rank's share that is not as it was written."""
    marker = folder / _MARKER
    listed = read_json(marker, remedy="delete this checkpoint")["files"] if marker.is_file() else None
    if listed is None:
        return f"{folder}: no {_MARKER}"
    for name in sorted(listed)[share.rank :: share.size]:
        path, wanted = folder / name, _File.model_validate(listed[name])
        size = path.stat().st_size if path.is_file() else None
        if size != wanted.bytes:
            return f"{path}: {'missing' if size is None else f'{size} bytes'} instead of {wanted.bytes} bytes"
        if sha256(path) != wanted.sha256:
            return f"{path}: other content than was written"
    return None


def _complete(run: Path) -> list[Path]:
    folders = [path for path in (run / "checkpoints").glob("step-*") if (path / _MARKER).is_file()]
    return sorted(folders, key=_step)


def _drop(run: Path, *, keep: int, best_step: int) -> None:
    """The marker goes first: a folder that is half gone has none."""
    for folder in _complete(run)[:-keep]:
        if _step(folder) != best_step:
            (folder / _MARKER).unlink()
            shutil.rmtree(folder)


def _step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step}"


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
