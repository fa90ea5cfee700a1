"""Training beside deepctr-torch 0.3.0 and fuxictr 2.3.10: rows/s and memory of whole processes, in turns.

The clicks have 26 columns of zipf ids (tables of 3.0 million rows together, vectors of 16), 13 numbers and one label;
every model has an MLP of 400-400-400. DIN reads one history of at most 20 ids beside them. Each side reads a parquet
file, ours one of four times the rows, runs its own loop with its own loader on 2 threads, and is timed from the end of
its warm-up steps to the end of its last step: start, table initialisation and evaluation are left out for all. The
peers' steps are timed by a hook of their optimizer, ours by the lines of metrics.jsonl.

Not alike: the peers move all rows of the tables with dense Adam each step; ours moves the rows that the step touched,
by row-wise Adagrad (the default) or Adam (`ours_adam`). deepctr-torch's default L2 of the tables is on; fuxictr clips
the gradient norm over all parameters and embeds the numbers too (16 % more flops in the MLP), and converts the
parquet file to npz before it starts. All sides compute in fp32 unless `--precision bf16` asks ours for bf16;
`--compile` makes one program of our dense part, at the first step, so within the warm-up. With `--device cuda` all
sides compute on one GPU, and the peers wait for it at the end of each step.

The libraries are installed into environments of their own below `--cache` the first time. The last line is a JSON
object of the ratios of rows/s (medians over the rounds) and of peak memory (the most of all rounds).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent / "peers"
PACKAGES = {
    "deepctr": ["torch", "deepctr-torch==0.3.0", "requests", "pyarrow"],
    "fuxictr": ["torch", "fuxictr==2.3.10"],
}
TABLES = {f"C{at + 1}": int(rows) for at, rows in enumerate(np.geomspace(100, 925_000, 26))}
"""Rows of each table."""
NUMBERS = [f"I{at}" for at in range(1, 14)]
HISTORY, SLOTS = "hist_C26", 20
MODELS = ["deepfm", "dcn", "pnn1", "wide_deep", "din"]
STEPS = {1024: (10, 60), 4096: (6, 24), 16384: (3, 12)}
"""Warm-up steps and all steps of a peer's run, a multiple of these, by batch size."""
LONGER = 4
"""Ours has so many times the steps, as one takes a tenth of the time, and as many times the warm-up."""
OWN = {"ours": [], "ours_adam": ["embedding.optimizer=adam", "embedding.learning_rate=0.001"]}
DIFFERENCES = {
    "ours": "row-wise Adagrad of touched rows, no L2",
    "ours_adam": "Adam of touched rows, no L2",
    "deepctr": "Adam of all rows, L2 of the tables",
    "fuxictr": "Adam of all rows, no L2, norm clipped",
}
LIMIT = """
import sys, time, torch
torch.set_num_threads(2)
best, wait = 0.0, torch.cuda.synchronize if sys.argv[2] == "cuda" else lambda: None
for size, times in ((2048, 12), (4096, 3)):
    a, b = (torch.randn(size, size, device=sys.argv[2]).to(getattr(torch, sys.argv[1])) for _ in range(2))
    for _ in range(times):
        wait(); start = time.perf_counter(); a @ b; wait()
        best = max(best, 2 * size**3 / (time.perf_counter() - start) / 1e9)
print(best)
"""
"""Prints GFLOP/s: the fastest of the large square products of one type."""


class Run(NamedTuple):
    """What one process reached after its warm-up; gigabytes are its largest resident memory."""

    rows_per_second: float
    gigabytes: float


def main() -> None:
    """Makes the rows, runs the sides in turns, prints a table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["deepfm"], choices=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=[4096], choices=list(STEPS))
    parser.add_argument("--rounds", type=int, default=2, help="times that each side runs")
    parser.add_argument("--sides", nargs="+", default=[*OWN, *PACKAGES], choices=[*OWN, *PACKAGES])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="of our dense part")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--compile", action="store_true", help="our dense part as one program")
    parser.add_argument("--cache", type=Path, default=ROOT / "out" / "peers", help="where the libraries are installed")
    parser.add_argument("--quick", action="store_true", help="one round of DeepFM, batch 1024: shows that it works")
    options = parser.parse_args()
    if options.quick:
        options.models, options.batches, options.rounds = ["deepfm"], [1024], 1
    for side in [side for side in options.sides if side in PACKAGES]:
        install(options.cache / side, PACKAGES[side])
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="peers-benchmark-") as folder:
        for model in options.models:
            for batch_size in options.batches:
                figures |= compare(Path(folder), model, batch_size=batch_size, options=options)
    print(json.dumps(figures))


def compare(folder: Path, model: str, *, batch_size: int, options: argparse.Namespace) -> dict[str, float]:
    """All sides of one model and batch size, in turns."""
    text = experiment(model, precision=options.precision)
    rows = batch_size * STEPS[batch_size][1]
    for name, count in {"data": rows, "longer": LONGER * rows}.items():
        write_rows(folder / name, count, text=text, tables=TABLES, history=model == "din")
    limits, runs = list[float](), dict[str, list[Run]]((side, []) for side in options.sides)
    for _ in range(options.rounds):
        limits.append(gemm_limit(options.precision, device=options.device))
        for side, found in runs.items():
            found.append(one_run(side, folder, model=model, batch_size=batch_size, options=options))
    rates = {side: median(run.rows_per_second for run in found) for side, found in runs.items()}
    memory = {side: max(run.gigabytes for run in found) for side, found in runs.items()}
    each_limit = " ".join(f"{limit:.0f}" for limit in limits)
    print(f"{model}, batch {batch_size}, GEMM limit in {options.precision} before each round: {each_limit} GFLOP/s")
    for side, found in runs.items():
        each = " ".join(f"{run.rows_per_second:,.0f}" for run in found)
        how = f"{'fp32' if side in PACKAGES else options.precision}, {DIFFERENCES[side]}"
        print(f"  {side:10} {rates[side]:10,.0f} rows/s  {memory[side]:5.2f} GB  {how:45}  ({each})")
    name, figures = f"{model}_{batch_size}_{options.precision}", {}
    for own in [side for side in options.sides if side in OWN]:
        label = name + own.removeprefix("ours")
        for peer in [side for side in options.sides if side in PACKAGES]:
            figures[f"{label}_vs_{peer}"] = faster = round(rates[own] / rates[peer], 2)
            figures[f"{label}_memory_vs_{peer}"] = smaller = round(memory[own] / memory[peer], 2)
            print(f"  {own} has {faster} times the rows/s of {peer} in {smaller} times its memory")
    sys.stdout.flush()
    if "ours" in rates and model == "deepfm":
        flops = 3 * 2 * sum(a * b for a, b in ((26 * 16 + 13, 400), (400, 400), (400, 400), (400, 1)))
        shares = [run.rows_per_second * flops / limit / 1e9 for run, limit in zip(runs["ours"], limits, strict=True)]
        figures[f"{name}_gemm_share"] = round(median(shares), 3)
    return figures


def gemm_limit(precision: str, *, device: str) -> float:
    """GFLOP/s of large square products in the precision of our dense part."""
    line = [sys.executable, "-c", LIMIT, {"fp32": "float32", "bf16": "bfloat16"}[precision], device]
    return float(subprocess.run(line, check=True, capture_output=True, text=True).stdout)


def one_run(side: str, folder: Path, *, model: str, batch_size: int, options: argparse.Namespace) -> Run:
    """One side as a process."""
    data, warm_up = folder / "data", STEPS[batch_size][0] * (1 if side in PACKAGES else LONGER)
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    if side in PACKAGES:
        del environment["PYTHONPATH"]
        python = str(options.cache.resolve() / side / "bin" / "python")
        line = [python, str(HERE / f"run_{side}.py"), str(data), model, str(batch_size), options.device]
        printed, gigabytes = timed(line, folder=folder, environment=environment)
        ends = json.loads(printed.splitlines()[-1])
        return Run((len(ends) - warm_up) * batch_size / (ends[-1] - ends[warm_up - 1]), gigabytes)
    shutil.rmtree(folder / "run", ignore_errors=True)
    sets = [f"train.batch_size={batch_size}", f"train.log_every_steps={warm_up}", f"train.device={options.device}"]
    sets += OWN[side]
    sets += ["train.compile=true"] if options.compile else []
    longer = [str(folder / "longer.toml"), "--data", str(folder / "longer")]
    line = [sys.executable, "-m", "recsys", "train", *longer, "--run-dir", "run"]
    _, gigabytes = timed(
        [*line, *(part for setting in sets for part in ("--set", setting))], folder=folder, environment=environment
    )
    logged = [json.loads(text) for text in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in logged if record["step"] >= warm_up and "valid/auc" not in record]
    rows, seconds = (steps[-1][name] - steps[0][name] for name in ("rows", "seconds"))
    return Run(rows / seconds, gigabytes)


def timed(line: list[str], *, folder: Path, environment: dict[str, str]) -> tuple[str, float]:
    """What a process printed and its largest resident memory, in GB."""
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(line, cwd=folder, env=environment, stdout=printed, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        errors.seek(0)
        if process.returncode:
            sys.exit(f"{' '.join(line)} failed with code {process.returncode}:\n{errors.read()[-3000:]}")
        return printed.read(), usage.ru_maxrss * 1024 / 1e9


def install(folder: Path, packages: list[str]) -> None:
    """An environment with the packages, unless it is there; torch is of this environment's version."""
    if (folder / "ready").is_file():
        return
    import torch

    started = time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    named = [f"torch=={torch.__version__.split('+')[0]}" if name == "torch" else name for name in packages]
    subprocess.run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *named], check=True)
    (folder / "ready").touch()
    print(f"{folder}: installed in {time.perf_counter() - started:.0f} s", flush=True)


def write_rows(folder: Path, rows: int, *, text: str, tables: dict[str, int], history: bool) -> None:
    """A dataset folder, as the ETL writes it, and, beside it, the experiment file that trains on it, of this text.

    Written by a process of its own: Linux counts the largest memory of a process from that of its parent.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as own:
        own.submit(_write_rows, folder, rows, text=text, tables=tables, history=history).result()


def _write_rows(folder: Path, rows: int, *, text: str, tables: dict[str, int], history: bool) -> None:
    sys.path.insert(0, str(ROOT))
    from etl.experiment_file import load
    from etl.schema import DenseFeature, IdFeature, Schema, Table, TaskColumn
    from etl.shards import Finished, Shards
    from etl.spec import Etl
    from recsys.experiment import Experiment

    shutil.rmtree(folder, ignore_errors=True)
    folder.with_suffix(".toml").write_text(text, encoding="utf-8")
    features = [IdFeature(name=name, type="categorical", table=name, linear_only=False) for name in tables]
    if history:
        named: dict[str, Any] = {"name": HISTORY, "type": "sequence", "table": "C26", "dtype": "list<int64>"}
        features.append(IdFeature(**named, linear_only=False, slots=SLOTS))
    schema = Schema(
        features=tuple(features),
        dense=tuple(DenseFeature(name=name) for name in NUMBERS),
        tables=tuple(Table(name=name, rows=count) for name, count in tables.items()),
        tasks=(TaskColumn(name="label", positive_rate=0.25),),
    )
    rng = np.random.default_rng(0)
    drawn = columns(rng, rows, tables=tables, history=history)
    folder.mkdir()
    with Finished() as finished:
        for split, count in {"train": rows, "valid": 512, "test": 512}.items():
            shards = Shards(folder / split, Etl(), finished=finished)
            shards.write(drawn.slice(0, count))
            shards.close()
    schema.write(folder)
    (folder / "transform").mkdir()
    data_hash = load(folder.with_suffix(".toml"), overrides=[], into=Experiment).data_hash()
    (folder / "manifest.json").write_text(json.dumps({"hash": data_hash, "files": {}}))


def columns(rng: np.random.Generator, rows: int, *, tables: dict[str, int], history: bool) -> pa.Table:
    """Ids by zipf's law with exponent 1.05, scattered over their tables; id 0 is left out, as it stands for unseen."""
    found: dict[str, Any] = {}
    for name, size in tables.items():
        chance = np.cumsum(1 / np.arange(1, size) ** 1.05)
        own = rng.permutation(size - 1) + 1
        found[name] = own[np.searchsorted(chance, rng.random(rows) * chance[-1])]
        if history and name == "C26":
            ends = np.concatenate([[0], np.cumsum(rng.integers(1, SLOTS + 1, rows))])
            ids = own[np.searchsorted(chance, rng.random(ends[-1]) * chance[-1])]
            found[HISTORY] = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(ids))
    for name in NUMBERS:
        found[name] = rng.random(rows, dtype=np.float32)
    found["label"] = (rng.random(rows) < 0.25).astype(np.float32)
    return pa.table(found)


def experiment(model: str, *, precision: str) -> str:
    """Our experiment file."""
    din = f'attention = [{{query = ["C26"], keys = ["{HISTORY}"]}}]\nattention_activation = "relu"'
    sequence = (
        f'[[features]]\ntype = "sequence"\nname = "{HISTORY}"\ntable = "C26"\nmax_length = {SLOTS}\ndtype = "int64"'
    )
    return f"""
name = "peers"
[data]
format = "parquet"
train = ["train.parquet"]
valid = ["valid.parquet"]
test = ["test.parquet"]
[[tasks]]
name = "label"
[[features]]
type = "categorical"
dtype = "int64"
columns = {json.dumps(list(TABLES))}
{sequence if model == "din" else ""}
[[features]]
type = "numeric"
columns = {json.dumps(NUMBERS)}
[model]
kind = "{model}"
hidden = [400, 400, 400]
{din if model == "din" else ""}
[train]
epochs = 1
keep = 1
precision = "{precision}"
[embedding]
dim = 16
"""


if __name__ == "__main__":
    main()
