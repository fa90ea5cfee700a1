"""The run folder: the resolved experiment, what it learned from, its figures and its result."""

import json
import shutil
from pathlib import Path
from typing import Any

from etl.artifact import read_json, write_json, write_text
from etl.faults import Fault
from recsys.experiment import Experiment


def claim(run: Path, experiment: Experiment, *, data: Path) -> None:
    """Makes a run folder, or checks that an existing one is of the same experiment.

    Raises:
        Fault: the folder holds another experiment's run.
    """
    path = run / "experiment.json"
    if path.exists():
        _check_same(path, experiment.as_json())
        return
    run.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(data / "schema.json", run / "schema.json")
    shutil.copytree(data / "transform", run / "transform", dirs_exist_ok=True)
    write_json(run / "origin.json", {"data": str(data.resolve())})
    write_json(path, experiment.as_json())


def data_of(run: Path) -> Path:
    """The dataset folder that a run was trained on."""
    return Path(read_json(run / "origin.json", remedy="name a folder that 'recsys train' made")["data"])


def is_finished(run: Path) -> bool:
    """Whether the result is there."""
    return (run / "result.json").exists()


def cut_metrics(run: Path, step: int) -> None:
    """Drops the lines of steps after a checkpoint: they will be taken again."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    write_text(path, "".join(f"{line}\n" for line in lines if _step_of(line) <= step))


def append_metrics(run: Path, line: dict[str, float | None]) -> None:
    """One JSON object on a line of its own."""
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")


def _step_of(line: str) -> float:
    """A line that a killed run left unfinished counts as after every checkpoint."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return float("inf")


def _check_same(path: Path, wanted: Any) -> None:
    found = read_json(path, remedy="choose another --run folder")
    if found != wanted:
        differs = ", ".join(_differences(found, wanted, at="")[:5])
        got, remedy = f"a run with other settings: {differs}", "give --run another folder, or remove this one"
        raise Fault(str(path.parent), got=got, wanted="a new folder or a run of this experiment", remedy=remedy)


def _differences(found: Any, wanted: Any, *, at: str) -> list[str]:
    """Dotted paths of the settings that differ."""
    if not (isinstance(found, dict) and isinstance(wanted, dict)):
        return [] if found == wanted else [at]
    keys = sorted(found.keys() | wanted.keys())
    inner = (_differences(found.get(key), wanted.get(key), at=f"{at}.{key}" if at else key) for key in keys)
    return [path for paths in inner for path in paths]
