"""The ETL beside NVTabular on pandas and beside a plain copy: fit on the training rows, transform every split.

The rows look like Criteo's: 26 columns of 64-bit ids, zipf, with 100 to 1,000,000 different values, 13 numbers of which
5 % are missing, one label. Each side runs as a process of its own, in turns, from parquet to parquet (snappy):

- rankforge: `python -m etl run` with engine polars
- nvtabular: Categorify, and FillMissing, Clip, LogOp, Normalize, one process, as its users write it
- copy: polars reads all columns and writes them again

The last line is a JSON object: `vs_nvtabular` and `share_of_copy` are ratios of rows/s (medians over the rounds),
`peak_gb` the ETL's largest resident memory.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

IDS = [f"C{number}" for number in range(1, 27)]
NUMBERS = [f"I{number}" for number in range(1, 14)]
SHARES = {"train": 0.8, "valid": 0.1, "test": 0.1}
FILE_ROWS = 1_000_000
EXPERIMENT = f"""
name = "benchmark"
[data]
format = "parquet"
train = ["rows/train-*.parquet"]
valid = ["rows/valid-*.parquet"]
test = ["rows/test-*.parquet"]
[[tasks]]
name = "label"
[[features]]
type = "categorical"
dtype = "int64"
columns = {json.dumps(IDS)}
[[features]]
type = "numeric"
fill = 0.0
clip = [0.0, 1e9]
log1p = true
columns = {json.dumps(NUMBERS)}
"""
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
LOOPS = "from etl.engines.native import load; load()"  # compiled once an installation
COPY = """
import polars, sys
from pathlib import Path
for split in ("train", "valid", "test"):
    rows = polars.scan_parquet(f"rows/{split}-*.parquet")
    Path("copy", split).mkdir(parents=True)
    rows.sink_parquet(f"copy/{split}/part.parquet", compression="snappy", row_group_size=65536, statistics=False)
"""
NVTABULAR = f"""
import os, warnings
warnings.simplefilter("ignore")
import dask
dask.config.set({{"dataframe.convert-string": False, "dataframe.query-planning": False}})
import nvtabular as nvt
from nvtabular import ops
from pathlib import Path
ids = {json.dumps(IDS)} >> ops.Categorify(out_path="nvtabular/categories")
numbers = {json.dumps(NUMBERS)} >> ops.FillMissing(fill_val=0) >> ops.Clip(min_value=0)
numbers = numbers >> ops.LogOp() >> ops.Normalize()
workflow = nvt.Workflow(ids + numbers + ["label"])

def rows(split):
    return nvt.Dataset(sorted(str(path) for path in Path("rows").glob(f"{{split}}-*")), engine="parquet", cpu=True)

workflow.fit(rows("train"))
for split in {json.dumps(list(SHARES))}:
    workflow.transform(rows(split)).to_parquet(f"nvtabular/{{split}}")
"""


class Run(NamedTuple):
    """What one process took; gigabytes are its largest resident memory."""

    seconds: float
    cpu_seconds: float
    gigabytes: float


def main() -> None:
    """Makes the rows, runs the sides in turns, prints a table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--rounds", type=int, default=2, help="times that each side runs")
    parser.add_argument("--quick", action="store_true", help="200,000 rows, one round: shows that it works, no figures")
    parser.add_argument("--sides", nargs="+", default=["rankforge", "nvtabular", "copy"])
    options = parser.parse_args()
    rows, rounds = (200_000, 1) if options.quick else (options.rows, options.rounds)
    with tempfile.TemporaryDirectory(prefix="etl-benchmark-") as folder:
        write_rows(Path(folder), rows=rows)
        subprocess.run([sys.executable, "-c", LOOPS], env=ENVIRONMENT, check=True)
        runs: dict[str, list[Run]] = {side: [] for side in options.sides}
        for _ in range(rounds):
            for side, found in runs.items():
                found.append(run := timed(side, Path(folder)))
                rate = f"{rows / run.seconds:12,.0f} rows/s"
                print(f"{side:10} {run.seconds:8.1f} s {rate} {run.cpu_seconds:8.1f} CPU-s {run.gigabytes:6.2f} GB")
    seconds = {side: median(run.seconds for run in found) for side, found in runs.items()}
    figures = {"rows": rows, "peak_gb": round(max(run.gigabytes for run in runs["rankforge"]), 2)}
    if "nvtabular" in seconds:
        figures["vs_nvtabular"] = round(seconds["nvtabular"] / seconds["rankforge"], 2)
    if "copy" in seconds:
        figures["share_of_copy"] = round(seconds["copy"] / seconds["rankforge"], 3)
    print(json.dumps(figures))


def write_rows(folder: Path, *, rows: int) -> None:
    """Parquet files of at most a million rows, row groups of 65,536."""
    (folder / "rows").mkdir()
    (folder / "experiment.toml").write_text(EXPERIMENT, encoding="utf-8")
    rng = np.random.default_rng(0)
    sizes = np.geomspace(100, 1_000_000, len(IDS)).astype(int)
    values = [rng.integers(-(2**62), 2**62, size) for size in sizes]
    chances = [np.cumsum(1 / np.arange(1, size + 1) ** 1.05) for size in sizes]
    for split, share in SHARES.items():
        for first in range(0, round(rows * share), FILE_ROWS):
            count = min(FILE_ROWS, round(rows * share) - first)
            columns: dict[str, pa.Array] = {}
            for name, own, chance in zip(IDS, values, chances, strict=True):
                columns[name] = pa.array(own[np.searchsorted(chance, rng.random(count) * chance[-1])])
            for name in NUMBERS:
                number = np.exp(rng.normal(2, 2, count)).astype(np.float32)
                columns[name] = pa.array(number, mask=rng.random(count) < 0.05)
            columns["label"] = pa.array((rng.random(count) < 0.25).astype(np.float32))
            path = folder / "rows" / f"{split}-{first // FILE_ROWS:03}.parquet"
            pq.write_table(pa.table(columns), path, row_group_size=65_536)


def timed(side: str, folder: Path) -> Run:
    """One side as a process."""
    for name in ("out", "copy", "nvtabular"):
        shutil.rmtree(folder / name, ignore_errors=True)
    code = {"copy": COPY, "nvtabular": NVTABULAR}
    line = ["-c", code[side]] if side in code else ["-m", "etl", "run", "experiment.toml", "--out", "out/data"]
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *line], cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{side} failed with code {process.returncode}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9)


if __name__ == "__main__":
    main()
