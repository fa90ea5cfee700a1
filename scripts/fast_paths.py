"""What each faster way to train costs in accuracy: test AUC of DeepFM beside fp32 with Adam that moves every row.

A run is a process of its own; a finished one is not repeated and a killed one goes on, as in accuracy.py. The last line
is a JSON object: the mean test AUC of each way less that of the reference.

    python scripts/fast_paths.py adult --out out/fast
    python scripts/fast_paths.py frappe --out out/fast --set 'data.train=["FOLDER/train.csv.gz"]' ...
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

from accuracy import ROOT, figures

LAZY = ["embedding.optimizer=adam", "embedding.learning_rate=0.001"]
ROWWISE = ["embedding.optimizer=rowwise_adagrad", "embedding.learning_rate=0.02"]
# Chosen on the validation rows. The L2 of whole tables, which brings rows that are rarely seen to 0, waits a few steps.
FRAPPE_LAZY = ["embedding.update=touched", "embedding.l2_every_steps=10"]
FRAPPE_ROWWISE = [
    "embedding.update=touched",
    "embedding.l2_every_steps=50",
    "embedding.l2=0.01",
    "embedding.optimizer=rowwise_adagrad",
    "embedding.learning_rate=0.02",
]
BF16, COMPILED = "train.precision=bf16", "train.compile=true"
REFERENCE = "Adam on every row"
WAYS = {
    "adult": {
        REFERENCE: [*LAZY, "embedding.update=all"],
        "Adam on touched rows": LAZY,
        "row-wise Adagrad": ROWWISE,
        "row-wise Adagrad, compiled": [*ROWWISE, COMPILED],
        "row-wise Adagrad, bf16": [*ROWWISE, BF16],
        "row-wise Adagrad, bf16, compiled": [*ROWWISE, BF16, COMPILED],
    },
    "frappe": {
        REFERENCE: [],
        f"{REFERENCE}, compiled": [COMPILED],
        f"{REFERENCE}, bf16": [BF16],
        f"{REFERENCE}, bf16, compiled": [BF16, COMPILED],
        "Adam on touched rows": FRAPPE_LAZY,
        "row-wise Adagrad": FRAPPE_ROWWISE,
    },
}
FILES = {"adult": "experiments/demo.toml", "frappe": "experiments/frappe/deepfm.toml"}


def main() -> None:
    """Runs what is missing, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=list(WAYS))
    parser.add_argument("--ways", nargs="+", help="some of them, by name")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--out", type=Path, required=True, help="folder for the datasets and the runs")
    parser.add_argument("--set", action="append", default=[], help="overrides one key of every run")
    options = parser.parse_args()
    ways = {way: sets for way, sets in WAYS[options.data].items() if way in (options.ways or [way])}
    found: dict[str, list[float]] = {way: [] for way in ways}
    for seed in options.seeds:
        for way, sets in ways.items():
            name = "_".join([options.data, *way.lower().replace(",", "").replace("-", " ").split()])
            overrides = [f"name={name}", "model.kind=deepfm", *sets, *options.set]
            (line,) = figures(ROOT / FILES[options.data], seed=seed, overrides=overrides, out=options.out)
            found[way].append(float(line["auc"]))
    print("| tables | test AUC | seeds |\n|---|---|---|")
    for way, aucs in found.items():
        spread = f" ± {stdev(aucs):.4f}" if len(aucs) > 1 else ""
        print(f"| {way} | {mean(aucs):.4f}{spread} | {', '.join(f'{auc:.4f}' for auc in aucs)} |")
    if REFERENCE in found:
        print(json.dumps({way: round(mean(aucs) - mean(found[REFERENCE]), 5) for way, aucs in found.items()}))


if __name__ == "__main__":
    main()
