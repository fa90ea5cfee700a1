"""Trains experiments for several seeds and writes what they reach on their test rows into docs/accuracy.csv.

Each run is a process of its own; a run that is finished is not repeated and one that was killed goes on, so the script
can be stopped and started again at any time. Lines of other experiments stay in the file. Then
`python scripts/write_docs.py` brings the figures into the tables of the documentation.

    python scripts/accuracy.py experiments/adult/*.toml --out out/accuracy
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from etl.experiment_file import load
from recsys.experiment import Experiment

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "accuracy.csv"
METRICS = ("auc", "logloss", "calibration", "accuracy")
COLUMNS = ("experiment", "kind", "seed", "task", *METRICS, "minutes")


def main() -> None:
    """Runs what is missing, then writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", type=Path, help="experiment files")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--out", type=Path, required=True, help="folder for the datasets and the runs")
    parser.add_argument("--set", action="append", default=[], help="overrides one key of every experiment")
    options = parser.parse_args()
    found = []
    for seed in options.seeds:
        for path in options.experiments:
            found += figures(path, seed=seed, overrides=options.set, out=options.out)
    TARGET.write_text(as_csv(merged(found)), encoding="utf-8")
    print(f"{TARGET}: {len(found)} lines of these experiments")


def figures(path: Path, *, seed: int, overrides: list[str], out: Path) -> list[dict[str, str]]:
    """One line a task, of a run that is made unless it is there."""
    experiment = load(path, overrides=overrides, into=Experiment)
    folder = out / experiment.name
    run = folder / f"seed-{seed}"
    if not (run / "result.json").is_file():
        sets = [part for setting in [*overrides, f"seed={seed}"] for part in ("--set", setting)]
        data = str(folder / "data")
        call("etl", "run", str(path), "--out", data, *sets)
        call("recsys", "train", str(path), "--data", data, "--run-dir", str(run), *sets)
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    name = path.resolve().relative_to(ROOT).as_posix()
    tasks = [task.name for task in experiment.tasks]
    start = {"experiment": name, "kind": experiment.model.kind, "seed": str(seed)}
    end = {"minutes": f"{result['seconds'] / 60:.1f}"}
    return [start | {"task": task} | measured(result["test"], task, alone=len(tasks) == 1) | end for task in tasks]


def call(*line: str) -> None:
    """One command of the project, its progress on the terminal."""
    subprocess.run([sys.executable, "-m", *line], check=True)


def measured(test: dict[str, Any], task: str, *, alone: bool) -> dict[str, str]:
    """The metrics of one task; several tasks stand in the result as task/metric."""
    names = {metric: metric if alone else f"{task}/{metric}" for metric in METRICS}
    return {metric: f"{test[name]:.6f}" for metric, name in names.items()}


def merged(found: list[dict[str, str]]) -> list[dict[str, str]]:
    """The file's lines with these in the place of those of the same experiment, seed and task."""
    lines = list(csv.DictReader(TARGET.open(encoding="utf-8", newline=""))) if TARGET.is_file() else []
    kept = {(line["experiment"], line["task"], line["seed"]): line for line in lines + found}
    return [kept[key] for key in sorted(kept)]


def as_csv(lines: list[dict[str, str]]) -> str:
    """With a header; no value needs quotes."""
    return "".join(f"{','.join(line)}\n" for line in [COLUMNS, *([line[name] for name in COLUMNS] for line in lines)])


if __name__ == "__main__":
    main()
