"""Step time and memory of `recsys train` by the size of the tables: 1e6, 1e7 and 5e7 rows together, DeepFM, in turns.

Rows, models and batches are those of peers.py; only the tables grow. The ids follow zipf's law within each table, so
that a larger table is also read at more different places. A row has 16 numbers, a first-order weight and padding, 80
bytes, and 4 bytes of state by row-wise Adagrad (twice the row by Adam).

`ms` is the median over the lines of metrics.jsonl, five steps each, the first left out, and `waited` the share of these
steps that went into waiting for a batch. `excess` is the largest resident memory of the process over tables and states:
libraries, batches, activations, and what initialisation, evaluation and the last checkpoint took for themselves. With
`--save-every` a checkpoint is also written while training
goes on, for which tables and states are copied. The last line is a JSON object: the slowest size over the fastest, by
the medians of all rounds, and the largest excess in MB.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
from peers import ROOT, TABLES, experiment, timed, write_rows

STATES = {"rowwise_adagrad": 4, "adam": 160}
"""Bytes of optimizer state for each row."""
ROW_BYTES = 80
LINE_STEPS = 5


def main() -> None:
    """Trains each size in turns, prints a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=float, default=[1e6, 1e7, 5e7], help="of all tables together")
    parser.add_argument("--optimizer", default="rowwise_adagrad", choices=list(STATES))
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--save-every", type=int, help="steps between checkpoints; unset: one at the end")
    parser.add_argument("--quick", action="store_true", help="small tables, few steps: shows that it works, no figures")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.batch_size, options.steps, options.rounds = [1e5, 1e6], 512, 4 * LINE_STEPS, 1
    found: dict[float, list[float]] = {rows: [] for rows in options.rows}
    excesses = []
    with tempfile.TemporaryDirectory(prefix="table-size-") as folder:
        tables = {rows: sizes(rows) for rows in options.rows}
        for rows, own in tables.items():
            data = Path(folder, f"{rows:.0e}", "data")
            data.parent.mkdir()
            text = experiment("deepfm", precision="fp32")
            write_rows(data, options.batch_size * options.steps, text=text, tables=own, history=False)
        for _ in range(options.rounds):
            for rows, own in tables.items():
                ms, waited, peak = trained(Path(folder, f"{rows:.0e}"), options)
                held = sum(own.values()) * (ROW_BYTES + STATES[options.optimizer]) / 1e6
                found[rows].append(ms)
                excesses.append(peak - held)
                memory = f"peak {peak:,.0f} MB, excess {peak - held:,.0f} MB"
                print(f"{rows:.0e} rows: {ms:6.1f} ms, waited {waited:.1%}, {memory}", flush=True)
    medians = [median(ms) for ms in found.values()]
    ratio = max(medians) / min(medians)
    print(json.dumps({"slowest_over_fastest": round(ratio, 3), "excess_mb": round(max(excesses))}))


def sizes(rows: float) -> dict[str, int]:
    """Tables of the same proportions as those of peers.py, `rows` together."""
    return {name: max(int(count * rows / sum(TABLES.values())), 10) for name, count in TABLES.items()}


def trained(folder: Path, options: argparse.Namespace) -> tuple[float, float, float]:
    """Milliseconds a step, the share of waiting for batches, and MB of the largest resident memory."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    sets = [
        f"train.batch_size={options.batch_size}",
        f"train.log_every_steps={LINE_STEPS}",
        f"embedding.optimizer={options.optimizer}",
        *([f"train.checkpoint_every_steps={options.save_every}"] if options.save_every else []),
    ]
    line = [sys.executable, "-m", "recsys", "train", str(folder / "data.toml"), "--data", str(folder / "data")]
    line += ["--run-dir", str(folder / "run"), *(part for setting in sets for part in ("--set", setting))]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    _, gigabytes = timed(line, folder=folder, environment=environment)
    logged = [json.loads(text) for text in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in logged if record["step"] >= LINE_STEPS and "valid/auc" not in record]
    seconds = np.diff([record["seconds"] for record in steps])
    waited = sum(record["ms/data"] for record in steps[1:]) * LINE_STEPS / 1000 / seconds.sum()
    shutil.rmtree(folder / "run")
    return 1000 * float(np.median(seconds)) / LINE_STEPS, waited, 1000 * gigabytes


if __name__ == "__main__":
    main()
