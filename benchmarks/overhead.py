"""The trainer beside a hand-written TorchRec loop: the same rows, the same DeepFM, the same optimizers, one process.

The loop is what one writes with TorchRec's documentation at hand: an EmbeddingBagCollection with row-wise Adagrad in
the backward pass under DistributedModelParallel, a head, Adam, and parquet shards read in a thread. It shuffles within
a row group, logs nothing and saves nothing; the trainer logs, and saves as often as `--save-every` says. Rows look like
Criteo's: 26 ids, zipf, and 13 numbers.

On CPU a third side is the trainer on two ranks with half of the cores each, for the same global batch.

Each side runs as a process of its own, in turns, A B A B. The last line is a JSON object: vs_hand_written is the
trainer's time per step over the loop's, two_ranks_over_one its time on two ranks over that on one, medians over the
rounds.
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
IDS, NUMBERS = [f"C{at}" for at in range(26)], [f"I{at}" for at in range(13)]
DIM, HIDDEN = 16, [400, 400, 400]
FIRST_STEP = 20
EXPERIMENT = f"""
name = "overhead"
[data]
format = "parquet"
train = ["{{folder}}/raw/train.parquet"]
valid = ["{{folder}}/raw/valid.parquet"]
test = ["{{folder}}/raw/valid.parquet"]
[[features]]
type = "categorical"
columns = {json.dumps(IDS)}
dtype = "int64"
[[features]]
type = "numeric"
columns = {json.dumps(NUMBERS)}
[[tasks]]
name = "click"
[model]
kind = "deepfm"
hidden = {json.dumps(HIDDEN)}
keep_prob = 1.0
[embedding]
dim = {DIM}
optimizer = "rowwise_adagrad"
sharding = "table_wise"
[train]
epochs = 1
log_every_steps = {FIRST_STEP}
"""


class How(NamedTuple):
    """What both sides compute with."""

    device: str
    precision: str
    batch_size: int

    @property
    def options(self) -> list[str]:
        """The same as options of this script."""
        return ["--device", self.device, "--precision", self.precision, "--batch-size", str(self.batch_size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=140)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="60 steps, 2 rounds")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="of both dense parts")
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--save-every", type=int, default=5000, help="steps between two checkpoints of the trainer")
    parser.add_argument("--loop", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    how = How(arguments.device, arguments.precision, arguments.batch_size)
    if arguments.loop:
        print(json.dumps(hand_written(arguments.loop, how)))
        return
    steps, rounds = (60, 2) if arguments.quick else (arguments.steps, arguments.rounds)
    with tempfile.TemporaryDirectory(prefix="overhead-") as name:
        folder = Path(name)
        write_data(folder, rows=steps * how.batch_size)
        seconds: dict[str, list[float]] = {"trainer": [], "hand-written": [], "trainer on two ranks": []}
        if how.device == "cuda":
            del seconds["trainer on two ranks"]
        for at in range(rounds):
            for side, found in seconds.items():
                if side == "hand-written":
                    found.append(looped(folder, how))
                else:
                    ranks = 1 if side == "trainer" else 2
                    found.append(trained(folder, at, how=how, save_every=arguments.save_every, ranks=ranks))
            print(f"round {at + 1}, ms a step:", {side: round(1000 * found[-1], 1) for side, found in seconds.items()})
    ours, theirs, *two = (median(found) for found in seconds.values())
    figures = {"vs_hand_written": ours / theirs} | ({"two_ranks_over_one": two[0] / ours} if two else {})
    print(json.dumps({name: round(figure, 4) for name, figure in figures.items()}))


def write_data(folder: Path, *, rows: int) -> None:
    draw = np.random.default_rng(0)
    (folder / "raw").mkdir()
    for name, count in (("train", rows), ("valid", 4096)):
        sizes = np.geomspace(100, 300_000, len(IDS)).astype(int)
        ids = {column: draw.zipf(1.2, count) % size for column, size in zip(IDS, sizes, strict=True)}
        numbers = {column: draw.normal(size=count) for column in NUMBERS}
        click = (draw.random(count) < 0.25).astype(np.int64)
        pq.write_table(pa.table({**ids, **numbers, "click": click}), folder / "raw" / f"{name}.parquet")
    (folder / "overhead.toml").write_text(EXPERIMENT.format(folder=folder))
    run("-m", "etl", "run", str(folder / "overhead.toml"), "--out", str(folder / "data"))


def run(*arguments: str, ranks: int = 1) -> str:
    own = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    if ranks > 1:
        own["OMP_NUM_THREADS"] = str(max((os.cpu_count() or ranks) // ranks, 1))
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=own, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return done.stdout


def trained(folder: Path, at: int, *, how: How, save_every: int, ranks: int) -> float:
    """Seconds a step of `recsys train`, reading and logging included, and saving where it is due; evaluation is not."""
    own = folder / f"run-{ranks}-{at}"
    where = ["--data", str(folder / "data"), "--run-dir", str(own)]
    chosen = how._asdict() | {"checkpoint_every_steps": save_every, "batch_size": how.batch_size // ranks}
    sets = [f"train.{key}={value}" for key, value in chosen.items()]
    settings = [part for value in sets for part in ("--set", value)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    run(*launcher, "-m", "recsys", "train", str(folder / "overhead.toml"), *where, *settings, ranks=ranks)
    lines = [json.loads(line) for line in (own / "metrics.jsonl").read_text().splitlines()]
    steps = [
        line for line in lines if line["step"] >= FIRST_STEP and not any(name.startswith("valid/") for name in line)
    ]
    return float((steps[-1]["seconds"] - steps[0]["seconds"]) / (steps[-1]["step"] - steps[0]["step"]))


def looped(folder: Path, how: How) -> float:
    return float(json.loads(run(__file__, "--loop", str(folder / "data"), *how.options).splitlines()[-1]))


def sharded_deepfm(tables: dict[str, int], device: Any) -> Any:
    """DeepFM under DistributedModelParallel, its tables moved in the backward pass."""
    import torch
    from torch import Tensor, nn
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
    from torchrec.distributed import DistributedModelParallel
    from torchrec.optim import RowWiseAdagrad, apply_optimizer_in_backward

    class DeepFM(nn.Module):
        """First-order weights are the last columns of the rows."""

        def __init__(self) -> None:
            super().__init__()
            configs = [
                EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=DIM + 4, feature_names=[name])
                for name, rows in tables.items()
            ]
            self.tables = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
            widths = [len(tables) * DIM + len(NUMBERS), *HIDDEN]
            layers = [part for a, b in zip(widths, HIDDEN, strict=False) for part in (nn.Linear(a, b), nn.ReLU())]
            self.deep, self.wide = nn.Sequential(*layers, nn.Linear(HIDDEN[-1], 1)), nn.Linear(len(NUMBERS), 1)

        def forward(self, ids: KeyedJaggedTensor, numbers: Tensor) -> Tensor:
            rows = self.tables(ids).values().view(len(numbers), len(tables), DIM + 4)
            vectors, first = rows[:, :, :DIM], rows[:, :, DIM].sum(dim=1)
            pairs = 0.5 * (vectors.sum(dim=1).square() - vectors.square().sum(dim=1)).sum(dim=1)
            deep = self.deep(torch.cat([vectors.flatten(1), numbers], dim=1))[:, 0]
            return deep + self.wide(numbers)[:, 0] + first + pairs

    network = DeepFM()
    apply_optimizer_in_backward(RowWiseAdagrad, network.tables.parameters(), {"lr": 0.02, "eps": 1e-8})
    return DistributedModelParallel(network, device=device)


def hand_written(data: Path, how: How) -> float:
    """Seconds a step of the loop, from the same step on."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch._C._distributed_c10d import HashStore
    from torchrec import KeyedJaggedTensor

    tables = {table["name"]: table["rows"] for table in json.loads((data / "schema.json").read_text())["tables"]}
    device, backend = torch.device(how.device), "nccl" if how.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    model = sharded_deepfm(tables, device)
    dense = [value for name, value in model.named_parameters() if not name.startswith("tables")]
    optimizer, loss_of = torch.optim.Adam(dense, lr=1e-3), nn.BCEWithLogitsLoss()
    for step, (ids, numbers, labels) in enumerate(
        in_a_thread(read(data / "train", list(tables), batch_size=how.batch_size)), start=1
    ):
        lengths = torch.ones(ids.size, dtype=torch.int32)
        keyed = KeyedJaggedTensor(list(tables), torch.from_numpy(ids).reshape(-1), lengths=lengths).to(device)
        with torch.autocast(how.device, dtype=torch.bfloat16, enabled=how.precision == "bf16"):
            logits = model(keyed, torch.from_numpy(numbers).to(device))
        loss = loss_of(logits.float(), torch.from_numpy(labels).to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == FIRST_STEP:
            float(loss.detach())  # waits for the device
            began = time.perf_counter()
    float(loss.detach())
    return (time.perf_counter() - began) / (step - FIRST_STEP)


def read(folder: Path, names: list[str], *, batch_size: int) -> Iterator[Any]:
    """Ids [F, B], numbers [B, N] and labels [B] of whole batches."""
    draw, kept = np.random.default_rng(0), None
    for path in sorted(folder.glob("*.parquet")):
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, use_threads=False)
            ids = np.stack([table[name].to_numpy() for name in names])
            numbers = np.stack([table[name].to_numpy() for name in NUMBERS], axis=1)
            labels, order = table["click"].to_numpy(), draw.permutation(table.num_rows)
            parts = (ids[:, order], numbers[order], labels[order])
            if kept is not None:
                parts = (
                    np.concatenate([kept[0], parts[0]], axis=1),
                    np.concatenate([kept[1], parts[1]]),
                    np.concatenate([kept[2], parts[2]]),
                )
            whole = len(parts[2]) - len(parts[2]) % batch_size
            for low in range(0, whole, batch_size):
                rows = slice(low, low + batch_size)
                yield np.ascontiguousarray(parts[0][:, rows]), parts[1][rows], parts[2][rows]
            kept = (parts[0][:, whole:], parts[1][whole:], parts[2][whole:])


def in_a_thread(batches: Iterator[Any]) -> Iterator[Any]:
    made: queue.Queue[Any] = queue.Queue(8)

    def fill() -> None:
        for batch in batches:
            made.put(batch)
        made.put(None)

    threading.Thread(target=fill, daemon=True).start()
    while (batch := made.get()) is not None:
        yield batch


if __name__ == "__main__":
    main()
