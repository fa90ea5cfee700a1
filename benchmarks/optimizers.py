"""Step time of the trainer by the optimizer of its tables, each on the rows that a step touched, in turns.

DeepFM on the rows of peers.py, batches ready in memory, one process: every optimizer takes a batch before any takes the
next, so that what else the machine does falls on all alike. `ms` is the median over the steps after the warm-up,
`sparse` that of what comes after the gradient of the looked up rows. The last line is a JSON object: each median over
that of row-wise Adagrad.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from peers import ROOT, TABLES, experiment, write_rows

OPTIMIZERS = ("rowwise_adagrad", "adagrad", "adam", "momentum", "ftrl", "sgd")
WARM_UP = 4


def main() -> None:
    """Makes the rows, trains, prints a line for each optimizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=44)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few small steps: shows that it works, no figures")
    options = parser.parse_args()
    if options.quick:
        options.batch_size, options.steps = 512, WARM_UP + 2
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="optimizers-") as folder:
        data, text = Path(folder, "data"), experiment("deepfm", precision="fp32")
        rows = options.batch_size * options.steps
        write_rows(data, rows, text=text, tables=TABLES, history=False)
        steps = timed_steps(data, batch_size=options.batch_size)
    first = median(seconds for seconds, _ in steps[OPTIMIZERS[0]])
    ratios = {}
    for name, found in steps.items():
        whole, sparse = (1000 * median(column) for column in zip(*found, strict=True))
        ratios[name] = round(whole / 1000 / first, 3)
        print(f"{name:16} {whole:7.1f} ms, sparse {sparse:6.1f} ms, {ratios[name]:.2f} of {OPTIMIZERS[0]}")
    print(json.dumps(ratios))


def timed_steps(data: Path, *, batch_size: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each step after the warm-up, and of its sparse part, by optimizer."""
    sys.path.insert(0, str(ROOT))
    from etl.experiment_file import load
    from etl.schema import read_schema
    from recsys.data import Slice, Split
    from recsys.experiment import Experiment
    from recsys.learner import Learner
    from recsys.parallel.world import open_world

    schema, found = read_schema(data), {name: list[tuple[float, float]]() for name in OPTIMIZERS}
    with open_world("cpu") as world:
        learners = {}
        for name in OPTIMIZERS:
            sets = [f"embedding.optimizer={name}", f"train.batch_size={batch_size}"]
            learners[name] = Learner(
                load(data.with_suffix(".toml"), overrides=sets, into=Experiment), schema, world=world
            )
        order = Split(data / "train", schema).shuffled(Slice(0, 1, batch_size), seed=0, epoch=0, start=0)
        for step, batch in enumerate(list(order), start=1):
            for name, learner in learners.items():
                began = time.perf_counter()
                learner.update(batch, step=step, guard=lambda scored, batch, logloss: None)
                seconds, laps = time.perf_counter() - began, learner.clock.read()
                if step > WARM_UP:
                    found[name].append((seconds, laps["sparse"]))
    return found


if __name__ == "__main__":
    main()
