"""Trains every experiment of experiments/frappe for several seeds and writes the table of docs/accuracy.md.

Each run is a process of its own; a run that is finished is not repeated and one that was killed goes on, so the script
can be stopped and started again at any time.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments" / "frappe"
PUBLISHED = {
    "wide": ("LR", 0.9356, 0.3076),
    "fm": ("FM", 0.9671, 0.2065),
    "afm": ("AFM", 0.9697, 0.2264),
    "nfm": ("NFM", 0.9804, 0.2058),
    "deep": ("DNN", 0.9833, 0.1622),
    "pnn1": ("PNN, inner", 0.9841, 0.1540),
    "wide_deep": ("Wide & Deep", 0.9841, 0.1490),
    "deepfm": ("DeepFM", 0.9842, 0.1482),
    "dcn": ("DCN", 0.9839, 0.1527),
    "dcnv2": ("DCN-v2", 0.9845, None),
    "dlrm": ("DLRM", 0.9840, None),
    "autoint": ("AutoInt+", 0.9848, None),
    "final_mlp": ("FinalMLP", 0.9861, None),
    "fnn": ("FNN", None, None),
    "pnn2": ("PNN, kernel", None, None),
    "deep_crossing": ("Deep Crossing", None, None),
    "masknet": ("MaskNet", None, None),
}
"""Test AUC and log loss of openbenchmark/BARS, Frappe_x1, single runs."""


def main() -> None:
    """Runs what is missing, then writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with train.csv.gz, valid.csv.gz and test.csv.gz")
    parser.add_argument("out", type=Path, help="folder for the dataset and the runs")
    parser.add_argument("--models", nargs="+", default=list(PUBLISHED), choices=list(PUBLISHED), metavar="KIND")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--table", type=Path, help="write the table into this file instead of printing it")
    options = parser.parse_args()
    for seed in options.seeds:
        for kind in options.models:
            train(kind, seed=seed, source=options.source, out=options.out)
    text = table(options.out, kinds=options.models, seeds=options.seeds)
    if options.table:
        options.table.write_text(text, encoding="utf-8")
    else:
        print(text)


def train(kind: str, *, seed: int, source: Path, out: Path) -> None:
    """One run, unless its result is there; the dataset is made first."""
    run = out / f"{kind}_{seed}"
    if (run / "result.json").is_file():
        return
    files = [f'data.{split}=["{source / split}.csv.gz"]' for split in ("train", "valid", "test")]
    sets = [part for setting in files for part in ("--set", setting)]
    experiment = str(EXPERIMENTS / f"{kind}.toml")
    subprocess.run([sys.executable, "-m", "etl", "run", experiment, "--out", str(out / "data"), *sets], check=True)
    where = ["--data", str(out / "data"), "--run-dir", str(run), "--set", f"seed={seed}"]
    subprocess.run([sys.executable, "-m", "recsys", "train", experiment, *where, *sets], check=True)


def table(out: Path, *, kinds: list[str], seeds: list[int]) -> str:
    """Markdown: mean and spread over the seeds beside the published figures."""
    lines = [
        "| model | test AUC, mean | seeds | log loss, mean | published AUC | published log loss | minutes a run |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in kinds:
        runs = [json.loads((out / f"{kind}_{seed}" / "result.json").read_text()) for seed in seeds]
        auc, logloss = ([run["test"][name] for run in runs] for name in ("auc", "logloss"))
        name, published, published_logloss = PUBLISHED[kind]
        of_seeds = ", ".join(f"{value:.4f}" for value in auc)
        minutes = np.mean([run["seconds"] for run in runs]) / 60
        known = " | ".join("–" if value is None else f"{value:.4f}" for value in (published, published_logloss))
        means = f"{np.mean(auc):.4f} | {of_seeds} | {np.mean(logloss):.4f}"
        lines.append(f"| {name} (`{kind}`) | {means} | {known} | {minutes:.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
