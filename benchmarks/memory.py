"""The memory that `recsys plan` forecasts beside the peak that `recsys train` reaches, for four models on CPU.

Each model trains for two epochs on random rows, with evaluations and checkpoints, in a process of its own, whose
largest resident memory the system reports. The last line is a JSON object: `largest_error`, a share of the peak; above
15 % the exit status is 1.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1]))

from etl.artifact import write_json
from etl.experiment_file import load
from etl.schema import DenseFeature, IdFeature, Schema, Table, TaskColumn
from recsys.experiment import Experiment

TABLES, DENSE, GROUP = 8, 4, 16_384
SPLITS = {"train": 60_000, "valid": 8_000, "test": 8_000}


class Size(NamedTuple):
    """Rows of each of 8 tables, rows of a batch, hidden widths, the tables' optimizer, and batches of a step."""

    rows: int
    batch: int
    hidden: str
    optimizer: str
    parts: int = 1


SIZES = (
    Size(300_000, 1024, "[256, 128]", "rowwise_adagrad"),
    Size(600_000, 8192, "[1024, 512]", "adagrad"),
    Size(300_000, 4096, "[512, 256]", "adagrad", parts=4),
    Size(3_000_000, 2048, "[400, 400, 400]", "rowwise_adagrad"),
)
LARGEST_ERROR = 0.15


def write_model(folder: Path, size: Size) -> Path:
    """An experiment and its dataset folder."""
    text = f"""
name = "memory"
[data]
train = ["a.csv"]
valid = ["b.csv"]
test = ["c.csv"]
[[features]]
type = "categorical"
columns = ["C1..C{TABLES}"]
[[features]]
type = "numeric"
columns = ["x1..x{DENSE}"]
[[tasks]]
name = "click"
[etl]
rows_per_group = {GROUP}
[model]
kind = "deepfm"
hidden = {size.hidden}
[train]
batch_size = {size.batch}
accumulate = {size.parts}
epochs = 2
[embedding]
optimizer = "{size.optimizer}"
"""
    path = folder / "memory.toml"
    path.write_text(text)
    ids, numbers = [f"C{at + 1}" for at in range(TABLES)], [f"x{at + 1}" for at in range(DENSE)]
    schema = Schema(
        features=tuple(IdFeature(name=n, type="categorical", table=n, linear_only=False) for n in ids),
        dense=tuple(DenseFeature(name=name) for name in numbers),
        tables=tuple(Table(name=name, rows=size.rows) for name in ids),
        tasks=(TaskColumn(name="click", positive_rate=0.5),),
    )
    rng, data = np.random.default_rng(0), folder / "data"
    (data / "transform").mkdir(parents=True)
    for split, rows in SPLITS.items():
        (data / split).mkdir(parents=True)
        columns: dict[str, Any] = {name: rng.integers(0, size.rows, rows) for name in ids}
        columns |= {name: rng.normal(size=rows).astype(np.float32) for name in numbers}
        columns["click"] = rng.integers(0, 2, rows).astype(np.float32)
        pq.write_table(pa.table(columns), data / split / "part-0.parquet", row_group_size=GROUP)
    schema.write(data)
    write_json(data / "manifest.json", {"hash": load(path, overrides=[], into=Experiment).data_hash(), "files": {}})
    return path


def peak_bytes(command: list[str]) -> int:
    """Largest resident memory of a process."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[1])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: exit status {status}")
    return usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the two smaller models")
    quick = parser.parse_args().quick
    errors = []
    for size in SIZES[:2] if quick else SIZES:
        with tempfile.TemporaryDirectory() as name:
            path, data = write_model(Path(name), size), Path(name) / "data"
            recsys = [sys.executable, "-m", "recsys"]
            line = [*recsys, "plan", str(path), "--data", str(data), "--json"]
            done = subprocess.run(line, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
            parts: dict[str, int] = json.loads(done.stdout)["ranks"][0]["ddr"]
            line = [*recsys, "train", str(path), "--data", str(data), "--run-dir", str(Path(name) / "run")]
            peak, forecast = peak_bytes(line), sum(parts.values())
        errors.append(abs(forecast / peak - 1))
        shown = ", ".join(f"{part} {count / 1e6:,.0f}" for part, count in parts.items())
        print(
            f"{size}: forecast {forecast / 1e6:,.0f} MB ({shown}), peak {peak / 1e6:,.0f} MB, off by {errors[-1]:.1%}"
        )
    print(json.dumps({"largest_error": max(errors)}))
    sys.exit(max(errors) > LARGEST_ERROR)


if __name__ == "__main__":
    main()
