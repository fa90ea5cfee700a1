"""The run folder: what an experiment's training leaves, begun once and continued by the same command."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from etl.artifact import Json, digest, new_folder, read_json, sha256, write_json, write_text
from etl.faults import Fault
from etl.schema import Schema
from recsys.experiment import Experiment, read_experiment
from recsys.shards import REMEDY

_DATA = "data.json"
_FREE = {
    "train": {"batch_size", "accumulate", "checkpoint_every_steps", "keep"}
    | {"log_every_steps", "tensorboard", "dead_after_s"},
    "embedding": {"sharding", "placement", "column_width", "cache_share", "forward_comm", "backward_comm"},
}
"""Settings, of single tables too, with which a run that is not at its end may go on: what was saved fits them all."""


def open_run(run: Path, experiment: Experiment, *, schema: Schema, data: Path) -> None:
    """Begins a run folder, or checks that the one there is of this experiment.

    One that has no result yet goes on also where the number of ranks, the rows of a step or the places of tables are
    others by now: the log says so, and `experiment.json` is written anew.

    Raises:
        Fault: the folder holds another experiment's run or one on other rows, or is no run folder.
    """
    rows = digest(_files(data))
    if (run / "experiment.json").is_file():
        _refuse_other_rows(run, data, rows=rows)
        return _go_on(run, experiment, there=read_experiment(run))
    if run.exists() and any(run.iterdir()):
        got, remedy = "a folder of something else", "use --run with a new folder"
        raise Fault(str(run), got=got, wanted="a run folder or a free place", remedy=remedy)
    with new_folder(run, marker="experiment.json") as beside:
        shutil.copytree(data / "transform", beside / "transform")
        schema.write(beside)
        write_json(beside / _DATA, {"files": rows})
        write_json(beside / "experiment.json", experiment.as_json())


def refuse_other_transform(run: Path, data: Path) -> None:
    """Raises Fault where the ids of a dataset folder do not mean what those of a run do."""
    made = {name: about["sha256"] for name, about in _files(data).items() if name.startswith("transform/")}
    if other := [name for name, hashed in made.items() if not _holds(run / name, hashed)]:
        got, wanted = f"{other[0]} of another fit than {run / other[0]}", "the folder that the run learned from"
        raise Fault(str(data), got=got, wanted=wanted, remedy="name that one with --data, or train anew")


def _holds(path: Path, hashed: str) -> bool:
    return path.is_file() and sha256(path) == hashed


def _files(data: Path) -> Json:
    found: Json = read_json(data / "manifest.json", remedy=REMEDY)["files"]
    return found


def _refuse_other_rows(run: Path, data: Path, *, rows: str) -> None:
    """A position in an epoch, and the ids of a vocabulary, mean nothing in a folder that was made of other rows."""
    known = read_json(run / _DATA, remedy="use --run with a new folder")["files"]
    if known != rows:
        got, wanted = f"other rows or another transform than {run} learned from", "the folder as it was then"
        remedy = "use --run with a new folder, and train.start_from to go on from what was learned"
        raise Fault(str(data), got=got, wanted=wanted, remedy=remedy)


def _go_on(run: Path, experiment: Experiment, *, there: Experiment) -> None:
    x, y = _flat(there.as_json()), _flat(experiment.as_json())
    changed = sorted(name for name in x.keys() | y.keys() if x.get(name) != y.get(name))
    ended = (run / "result.json").is_file()
    if other := [name for name in changed if ended or not _is_free(name)]:
        got = f"a run with other settings ({', '.join(other)})"
        remedy = "use --run with a new folder, or delete this one"
        raise Fault(str(run), got=got, wanted="a run of this experiment", remedy=remedy)
    if changed:
        told = ", ".join(f"{name} {x.get(name)} -> {y.get(name)}" for name in changed)
        logging.getLogger(__name__).warning("%s: goes on with other settings: %s", run, told)
        write_json(run / "experiment.json", experiment.as_json())


def _is_free(name: str) -> bool:
    parts = name.split(".")
    return parts[-1] in _FREE.get(parts[0], ())


def _flat(value: Any, name: str = "") -> Json:
    if not isinstance(value, dict):
        return {name: value}
    parts = [_flat(part, f"{name}.{key}" if name else key) for key, part in value.items()]
    return {key: part for flat in parts for key, part in flat.items()}


class MetricsFile:
    """`metrics.jsonl`: one object a line."""

    def __init__(self, run: Path, *, last_step: int) -> None:
        """Lines after `last_step` come from a run that was killed and are written again."""
        self._path = run / "metrics.jsonl"
        kept = [line for line in self._lines() if json.loads(line)["step"] <= last_step]
        write_text(self._path, "".join(f"{line}\n" for line in kept))

    def _lines(self) -> list[str]:
        if not self._path.exists():
            return []
        text = self._path.read_text(encoding="utf-8")
        return text[: text.rfind("\n") + 1].splitlines()

    def add(self, record: Json) -> None:
        """Appends one line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
