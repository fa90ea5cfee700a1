"""The trainer beside a hand-written TorchRec loop: the same rows, the same DeepFM, the same optimizers, one process.

The loop is what one writes with TorchRec's documentation at hand: an EmbeddingBagCollection with row-wise Adagrad in
the backward pass under DistributedModelParallel, a head, Adam, and parquet shards read in a thread. It shuffles within
a row group, logs nothing and saves nothing. Rows look like Criteo's: 26 ids, zipf, and 13 numbers.

Each side runs as a process of its own, in turns, A B A B. The last line is a JSON object: vs_hand_written is the
trainer's time per step over the loop's, medians over the rounds.
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
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
IDS, NUMBERS = [f"C{at}" for at in range(26)], [f"I{at}" for at in range(13)]
BATCH, DIM, HIDDEN = 4096, 16, [400, 400, 400]
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
batch_size = {BATCH}
epochs = 1
log_every_steps = {FIRST_STEP}
checkpoint_every_steps = 50
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=140)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="60 steps, 2 rounds")
    parser.add_argument("--loop", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.loop:
        print(json.dumps(hand_written(arguments.loop)))
        return
    steps, rounds = (60, 2) if arguments.quick else (arguments.steps, arguments.rounds)
    with tempfile.TemporaryDirectory(prefix="overhead-") as name:
        folder = Path(name)
        write_data(folder, rows=steps * BATCH)
        ours, theirs = [], []
        for at in range(rounds):
            ours.append(trained(folder, at))
            theirs.append(looped(folder))
            print(f"round {at + 1}: trainer {1000 * ours[-1]:.1f} ms a step, hand-written {1000 * theirs[-1]:.1f} ms")
    print(json.dumps({"vs_hand_written": round(median(ours) / median(theirs), 4)}))


def write_data(folder: Path, *, rows: int) -> None:
    draw = np.random.default_rng(0)
    (folder / "raw").mkdir()
    for name, count in (("train", rows), ("valid", BATCH)):
        sizes = np.geomspace(100, 300_000, len(IDS)).astype(int)
        ids = {column: draw.zipf(1.2, count) % size for column, size in zip(IDS, sizes, strict=True)}
        numbers = {column: draw.normal(size=count) for column in NUMBERS}
        click = (draw.random(count) < 0.25).astype(np.int64)
        pq.write_table(pa.table({**ids, **numbers, "click": click}), folder / "raw" / f"{name}.parquet")
    (folder / "overhead.toml").write_text(EXPERIMENT.format(folder=folder))
    run("-m", "etl", "run", str(folder / "overhead.toml"), "--out", str(folder / "data"))


def run(*arguments: str) -> str:
    own = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=own, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return done.stdout


def trained(folder: Path, at: int) -> float:
    """Seconds a step of `recsys train`, reading, logging and saving included; evaluation comes after."""
    where = ["--data", str(folder / "data"), "--run", str(folder / f"run-{at}")]
    run("-m", "recsys", "train", str(folder / "overhead.toml"), *where)
    lines = [json.loads(line) for line in (folder / f"run-{at}" / "metrics.jsonl").read_text().splitlines()]
    steps = [
        line for line in lines if line["step"] >= FIRST_STEP and not any(name.startswith("valid/") for name in line)
    ]
    return float((steps[-1]["seconds"] - steps[0]["seconds"]) / (steps[-1]["step"] - steps[0]["step"]))


def looped(folder: Path) -> float:
    return float(json.loads(run(__file__, "--loop", str(folder / "data")).splitlines()[-1]))


def hand_written(data: Path) -> float:
    """Seconds a step of the loop, from the same step on."""
    import torch
    import torch.distributed as dist
    from torch import Tensor, nn
    from torch._C._distributed_c10d import HashStore
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
    from torchrec.distributed import DistributedModelParallel
    from torchrec.optim import RowWiseAdagrad, apply_optimizer_in_backward

    tables = {table["name"]: table["rows"] for table in json.loads((data / "schema.json").read_text())["tables"]}

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

    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    network = DeepFM()
    settings = {"lr": 0.02, "eps": 1e-8}
    apply_optimizer_in_backward(RowWiseAdagrad, network.tables.parameters(), settings)
    model = DistributedModelParallel(network, device=torch.device("cpu"))
    dense = [value for name, value in model.named_parameters() if not name.startswith("tables")]
    optimizer, loss_of = torch.optim.Adam(dense, lr=1e-3), nn.BCEWithLogitsLoss()
    for step, (ids, numbers, labels) in enumerate(in_a_thread(read(data / "train", list(tables))), start=1):
        lengths = torch.ones(ids.size, dtype=torch.int32)
        keyed = KeyedJaggedTensor(list(tables), torch.from_numpy(ids).reshape(-1), lengths=lengths)
        loss = loss_of(model(keyed, torch.from_numpy(numbers)), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == FIRST_STEP:
            began = time.perf_counter()
    return (time.perf_counter() - began) / (step - FIRST_STEP)


def read(folder: Path, names: list[str]) -> Iterator[Any]:
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
            whole = len(parts[2]) - len(parts[2]) % BATCH
            for low in range(0, whole, BATCH):
                rows = slice(low, low + BATCH)
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
