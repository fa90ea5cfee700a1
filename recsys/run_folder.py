"""The run folder: what an experiment's training leaves, begun once and continued by the same command."""

import json
import shutil
from pathlib import Path
from typing import Any

from etl.artifact import Json, new_folder, write_json, write_text
from etl.faults import Fault
from etl.schema import Schema
from recsys.experiment import Experiment, read_experiment


def open_run(run: Path, experiment: Experiment, *, schema: Schema, data: Path) -> None:
    """Begins a run folder, or checks that the one there is of this experiment.

    Raises:
        Fault: the folder holds another experiment's run, or is no run folder.
    """
    if (run / "experiment.json").is_file():
        there = read_experiment(run)
        if there != experiment:
            got = f"a run with other settings ({', '.join(_differences(there, experiment))})"
            remedy = "use --run with a new folder, or delete this one"
            raise Fault(str(run), got=got, wanted="a run of this experiment", remedy=remedy)
        return
    if run.exists() and any(run.iterdir()):
        got, remedy = "a folder of something else", "use --run with a new folder"
        raise Fault(str(run), got=got, wanted="a run folder or a free place", remedy=remedy)
    with new_folder(run, marker="experiment.json") as beside:
        shutil.copytree(data / "transform", beside / "transform")
        schema.write(beside)
        write_json(beside / "experiment.json", experiment.as_json())


def _differences(a: Experiment, b: Experiment) -> list[str]:
    """Dotted names of the settings that differ, lists as a whole."""
    x, y = _flat(a.as_json()), _flat(b.as_json())
    return sorted(name for name in x.keys() | y.keys() if x.get(name) != y.get(name))


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
