"""`checkpoints/step-N/` of a run: written beside and renamed, valid once its marker is there."""

import dataclasses
import shutil
from pathlib import Path

from etl.artifact import read_json, write_json, write_text
from etl.faults import Fault
from recsys.progress import Progress

_MARKER = "complete"
_REMEDY = "remove this checkpoint: training goes on from the one before"


def folders(run: Path) -> list[Path]:
    """The valid checkpoints, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if (path / _MARKER).is_file()]
    return sorted(found, key=_step)


def newest(run: Path) -> Path | None:
    """Where a run goes on from."""
    found = folders(run)
    return found[-1] if found else None


def best(run: Path) -> Path:
    """The checkpoint of the best evaluation. Raises Fault where the run has none yet."""
    last = newest(run)
    step = read_progress(last).best_step if last else None
    folder = folder_of(run, step or 0)
    if not (folder / _MARKER).is_file():
        wanted = "a run that has been evaluated at least once"
        raise Fault(str(run), got="no best checkpoint", wanted=wanted, remedy="run 'recsys train' on its experiment")
    return folder


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint after a step lies."""
    return run / "checkpoints" / f"step-{step}"


def begin(run: Path, step: int) -> Path:
    """An empty folder to write tensors into; what earlier runs left half-written goes."""
    for left_over in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    beside = partial(run, step)
    beside.mkdir(parents=True)
    return beside


def partial(run: Path, step: int) -> Path:
    """Where the checkpoint is written before it is valid."""
    return run / "checkpoints" / f".step-{step}.partial"


def finish(run: Path, progress: Progress, *, keep: int) -> None:
    """Makes the written folder valid, then removes what is neither among the `keep` newest nor the best."""
    beside, target = partial(run, progress.step), folder_of(run, progress.step)
    write_json(beside / "progress.json", dataclasses.asdict(progress))
    write_text(beside / _MARKER, "")
    shutil.rmtree(target, ignore_errors=True)
    beside.replace(target)
    for old in folders(run)[:-keep]:
        if _step(old) != progress.best_step:
            (old / _MARKER).unlink()
            shutil.rmtree(old)


def read_progress(folder: Path) -> Progress:
    """The progress saved with a checkpoint."""
    raw = read_json(folder / "progress.json", remedy=_REMEDY)
    try:
        return Progress(**raw)
    except TypeError as error:
        wanted = "the progress of this version"
        raise Fault(str(folder / "progress.json"), got=str(error), wanted=wanted, remedy=_REMEDY) from None


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
