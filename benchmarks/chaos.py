"""Kills training at random and counts whether it comes to the same end: two ranks, one of them killed with SIGKILL at a
moment drawn from the seed, the other one left to notice, the same command given again.

A kill is "identical" where the continued run has the weights, the optimizer states, the metrics and the logged losses
of the run that nobody killed, bit for bit. It is a "hang" where a process lives on for more than --patience seconds
after it should have ended. Ranks are forked from a process that has loaded torch, so that a kill costs seconds; where
the kill comes before the ranks found each other, the survivor is ended too, as torchrun does.

Each kill has a number and is drawn from it and the seed alone, so that --first goes on where another call ended.

The last line is a JSON object: kills, identical, hangs.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import multiprocessing.process
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RANKS = 2
EXPERIMENT = """
name = "chaos"
seed = 5
[data]
format = "parquet"
train = ["{folder}/train.parquet"]
valid = ["{folder}/valid.parquet"]
test = ["{folder}/valid.parquet"]
[[features]]
type = "categorical"
columns = ["user", "item"]
dtype = "int64"
[[features]]
type = "numeric"
columns = ["x"]
[[tasks]]
name = "click"
[model]
kind = "deepfm"
hidden = [8]
keep_prob = 0.9
[embedding]
dim = 4
optimizer = "adam"
sharding = "row_wise"
[train]
batch_size = 32
epochs = 2
log_every_steps = 5
checkpoint_every_steps = 4
eval_every_steps = 15
dead_after_s = 8
"""
CONTEXT = multiprocessing.get_context("forkserver")
Process = multiprocessing.process.BaseProcess


class Place(NamedTuple):
    """Where the experiment, its data and its runs lie."""

    folder: Path

    @property
    def experiment(self) -> Path:
        return self.folder / "chaos.toml"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        found = chaos(Place(Path(name)), arguments)
    print(json.dumps(found))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="the number of the first kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=90.0, help="seconds until a process counts as hanging")
    parser.add_argument("--quick", action="store_true", help="3 kills")
    arguments = parser.parse_args()
    arguments.kills = 3 if arguments.quick else arguments.kills
    return arguments


def chaos(place: Place, arguments: argparse.Namespace) -> dict[str, int]:
    write_data(place)
    CONTEXT.set_forkserver_preload(["recsys.train", "recsys.cli"])
    began = time.monotonic()
    ranks = start(place, "alone")  # loads torch
    wait(ranks, arguments.patience)
    shutil.rmtree(place.run("alone"))
    loaded = time.monotonic()
    wait(start(place, "alone"), arguments.patience)
    length, wanted = time.monotonic() - loaded, outcome(place, "alone")
    print(f"a run takes {length:.1f} s, the first one {loaded - began:.1f} s; {len(wanted['lines'])} lines logged")
    print(f"weights and states {wanted['tensors']}")
    identical = hangs = 0
    for at in range(arguments.first, arguments.first + arguments.kills):
        draw = random.Random(f"{arguments.seed} {at}")
        name, victim, moment = f"killed-{at}", draw.randrange(RANKS), draw.random() * length
        hung, reached = kill_and_continue(place, name, victim=victim, moment=moment, patience=arguments.patience)
        same = not hung and outcome(place, name) == wanted
        hangs, identical = hangs + hung, identical + same
        verdict = "identical" if same else "HANG" if hung else "OTHER"
        print(f"{at:3}: rank {victim} killed after {moment:5.2f} s, {reached}: {verdict}", flush=True)
        shutil.rmtree(place.run(name), ignore_errors=True)
    return {"kills": arguments.kills, "identical": identical, "hangs": hangs}


def kill_and_continue(place: Place, name: str, *, victim: int, moment: float, patience: float) -> tuple[bool, str]:
    """Whether something hung, and how far the first try came."""
    ranks = start(place, name)
    time.sleep(moment)
    with contextlib.suppress(ProcessLookupError):
        os.kill(ranks[victim].pid or 0, signal.SIGKILL)
    if not (place.run(name) / "experiment.json").exists():
        time.sleep(1.0)
        for rank in ranks:
            rank.kill()
    hung = wait(ranks, patience) > 0
    saved = sorted(int(path.name[5:]) for path in (place.run(name) / "checkpoints").glob("step-*"))
    ended = (place.run(name) / "result.json").exists()
    reached = "ended" if ended else f"step {saved[-1]} saved" if saved else "nothing saved"
    return wait(start(place, name), patience) > 0 or hung, reached


def start(place: Place, name: str) -> list[Process]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        CONTEXT.Process(target=train_as, args=(place, name), kwargs={"rank": rank, "port": port}, daemon=True)
        for rank in range(RANKS)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def wait(ranks: list[Process], patience: float) -> int:
    """How many did not end in time; these are killed. The seconds are those in which this process ran itself: one that
    was stopped for a while, with the ranks, would find all of them late."""
    hanging = 0
    for rank in ranks:
        while rank.is_alive() and patience > 0:
            rank.join(min(1.0, patience))
            patience -= 1.0
        if rank.is_alive():
            hanging += 1
            rank.kill()
            rank.join()
    return hanging


def train_as(place: Place, name: str, *, rank: int, port: int) -> None:
    """One rank, as torchrun would start it; what it says goes to a file."""
    from recsys.cli import app

    place.run(name).parent.mkdir(exist_ok=True)
    log = os.open(place.folder / "runs" / f"{name}-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    app(["train", str(place.experiment), "--run", str(place.run(name)), "--data", str(place.data)])


def outcome(place: Place, name: str) -> dict[str, Any]:
    """What has to be the same; an empty one where there is no result."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    reader = CONTEXT.Process(target=read_outcome, args=(place.run(name), sender))
    reader.start()
    reader.join()
    found: dict[str, Any] = receiver.recv() if receiver.poll() else {}
    return found


def read_outcome(run: Path, sender: Any) -> None:
    from recsys.checkpoint import latest
    from recsys.parallel.state import read_tensors
    from recsys.progress import quiet_libraries

    quiet_libraries()
    if not (run / "result.json").is_file():
        return
    newest = latest(run)
    hashed = hashlib.sha256()
    for name, tensor in read_tensors(newest[0]).items() if newest else ():
        hashed.update(name.encode() + tensor.numpy().tobytes())
    result = json.loads((run / "result.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if is_exact(key)} for line in lines]
    exact = {key: value for key, value in result.items() if is_exact(key)}
    sender.send({"tensors": hashed.hexdigest(), "result": exact, "lines": kept})


def is_exact(key: str) -> bool:
    """Not a time, nor what follows from it."""
    return key in ("step", "epoch", "rows", "loss", "steps", "best_step", "valid", "test") or key.startswith("valid/")


def write_data(place: Place) -> None:
    draw = np.random.default_rng(1)
    for name, rows in (("train", 1500), ("valid", 300)):
        user, item, x = draw.integers(0, 40, rows), draw.integers(0, 25, rows), draw.normal(size=rows)
        chance = 1 / (1 + np.exp(-(x + np.sin(user) + np.cos(item))))
        columns = {"user": user, "item": item, "x": x, "click": (draw.random(rows) < chance).astype(np.int64)}
        pq.write_table(pa.table(columns), place.folder / f"{name}.parquet")
    place.experiment.write_text(EXPERIMENT.format(folder=place.folder))
    line = [sys.executable, "-m", "etl", "run", str(place.experiment), "--out", str(place.data)]
    subprocess.run(line, cwd=ROOT, check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
