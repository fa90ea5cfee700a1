"""Serving parity: the fitted state, row by row and without polars, gives the ids and floats of the dataset folder."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from etl.experiment_file import parse
from etl.faults import Fault
from etl.lookup import write_slots
from etl.pack import encode, pack
from etl.run import run
from etl.sources import read_raw_split
from etl.spec import FeatureSpec
from etl.transform import Transform

ROOT = Path(__file__).parents[2]
ROWS = 100_000
SPEC: dict[str, Any] = {
    "data": {"format": "parquet"} | {split: [f"{split}.parquet"] for split in ("train", "valid", "test")},
    "tasks": [{"name": "click"}],
    "features": [
        {"type": "categorical", "name": "user", "dtype": "int64", "min_count": 2},
        {"type": "categorical", "name": "city"},
        {"type": "categorical", "name": "hashed", "column": "city", "hash_rows": 1000},
        {"type": "categorical", "name": "hashed_user", "column": "user", "dtype": "int64", "hash_rows": 7},
        {"type": "bag", "name": "tags", "max_length": 4, "weight_column": "weights"},
        {"type": "sequence", "name": "seen", "max_length": 3, "dtype": "int64"},
        {
            "type": "numeric",
            "name": "wide",
            "fill": 0.0,
            "clip": [-1e300, 1e300],
            "log1p": True,
            "scale": "standardize",
        },
        {"type": "numeric", "name": "plain", "fill": -1.5, "scale": "none"},
        {"type": "numeric", "name": "ranged", "column": "plain", "fill": "median", "scale": "minmax"},
        {"type": "numeric", "name": "level", "column": "plain", "as": "buckets", "quantiles": 9},
        {"type": "numeric", "name": "field", "column": "whole", "as": "field", "scale": "standardize", "fill": "mean"},
        {"type": "cross", "name": "city_x_level", "inputs": ["city", "level"], "hash_rows": 500},
        {"type": "target", "name": "rate", "by": ["city", "user"]},
        {"type": "count", "name": "rows", "by": ["city"]},
    ],
}
USERS = [2**63 - 1, 2**63 - 2, -(2**63) + 2, 2**53, 2**53 + 1, -(2**53) - 1, 2**32, 0, -1, 1, None]
CITIES = ["", " ", "Bern", "bern", "東京", "e\u0301", "é", "😀", "\x00", "nan", "None", "null", "0", "x" * 300, None]
WIDE = [1.7e308, -1.7e308, 1e300, 5e-324, -5e-324, -0.0, 0.0, 1e-45, -1.0, 2.0**53 + 2, None, float("nan")]
PLAIN = [3.4028234e38, -3.4028234e38, 1.17e-38, 1e-45, 16777217.0, 0.1, -0.0, 1 / 3, None, float("nan"), 2.5]


def silent(stage: str, rows: int, *, total: int | None = None) -> None:
    """Nobody watches."""


def table(rows: int, *, seed: int, unseen: int) -> pa.Table:
    """Traps in every column; users and cities beyond the traps move with `unseen`."""
    rng = np.random.default_rng(seed)

    def some(values: list[Any], kind: pa.DataType) -> pa.Array:
        return pa.array([values[at] for at in rng.integers(0, len(values), rows)], kind)

    tags = [[CITIES[at] for at in rng.integers(0, len(CITIES), size)] for size in rng.integers(0, 5, rows)]
    seen = [[USERS[at] for at in rng.integers(0, len(USERS), size)] for size in rng.integers(0, 9, rows)]
    return pa.table(
        {
            "user": some([*USERS, *(2**62 + unseen + at for at in range(400))], pa.int64()),
            "city": some([*CITIES, *(f"town {unseen + at}" for at in range(100))], pa.string()),
            "tags": pa.array([row or [None, []][at % 2] for at, row in enumerate(tags)], pa.list_(pa.string())),
            "weights": pa.array([[float(rng.normal()) for _ in row] for row in tags], pa.list_(pa.float64())),
            "seen": pa.array([row or [None, []][at % 2] for at, row in enumerate(seen)], pa.list_(pa.int64())),
            "wide": some([*WIDE, *rng.lognormal(0, 9, 500).tolist()], pa.float64()),
            "plain": some([*PLAIN, *rng.normal(0, 9, 500).tolist()], pa.float64()),
            "whole": some([0, 255, 2**31, -(2**31), None, 2**53], pa.int64()),
            "click": pa.array(rng.integers(0, 2, rows).astype(np.float32)),
        }
    )


def spec(**changes: Any) -> FeatureSpec:
    return parse(SPEC | changes, place="x.toml", into=FeatureSpec)


def write(test_rows: int) -> None:
    for seed, (split, rows) in enumerate({"train": 6000, "valid": 50, "test": test_rows}.items()):
        pq.write_table(table(rows, seed=seed, unseen=50 * seed), f"{split}.parquet")


LOADED = 'print([name for name in sys.modules if name in ("polars", "nvtabular", "merlin", "torch", "etl")])'
CLIENT = f"""
import json, sys
from pathlib import Path
import numpy as np
import pyarrow.parquet as pq
from etl.pack import pack
from etl.transform import Signature
signature = Signature.from_json(json.loads(Path(sys.argv[1]).read_text())["signature"])
raw = pq.read_table(sys.argv[2]).combine_chunks()
part, parts = int(sys.argv[3]), int(sys.argv[4])
rows = [pack(raw.slice(at, 1), signature) for at in range(part, raw.num_rows, parts)]
keys, numbers = (np.concatenate([getattr(row, kind) for row in rows]) for kind in ("keys", "numbers"))
np.savez(f"packed{{part}}.npz", keys=keys, numbers=numbers)
{LOADED}
"""
SERVER = f"""
import importlib, sys
import numpy as np
from pathlib import Path
from types import ModuleType
package = sys.modules["copied"] = ModuleType("copied")
package.__path__ = [sys.argv[1]]
module = importlib.import_module("copied.transform")
transform = module.Transform.mapped(Path(sys.argv[2]))
packed = np.load(sys.argv[3])
keys, numbers = packed["keys"], packed["numbers"]
ids, floats = [], []
for at in range(len(keys)):
    row = module.Packed(keys[at : at + 1], numbers[at : at + 1])
    transform.check(row)
    encoded = transform.apply(row)
    ids.append(encoded.ids)
    floats.append(encoded.floats)
np.savez(sys.argv[4], ids=np.concatenate(ids), floats=np.concatenate(floats))
{LOADED}
"""


def folder_rows(split: Path, transform: Transform) -> tuple[np.ndarray, np.ndarray]:
    """The dataset's columns as the matrices that the network reads: -1 and 0 where a list has no value."""
    shards = pq.read_table(split)
    slots = transform.signature.slots

    def padded(name: str, *, size: int, nothing: float, kind: type) -> np.ndarray:
        values = shards[name].to_pylist()
        rows = [[value] if size == 1 else value + [nothing] * (size - len(value)) for value in values]
        return np.array(rows, kind).reshape(len(values), size)

    ids, floats = [], [padded(step["name"], size=1, nothing=0, kind=np.float32) for step in transform.dense]
    for step in transform.features:
        size = slots.get(step.get("column", ""), 1)
        ids.append(padded(step["name"], size=size, nothing=-1, kind=np.int64))
        if f"{step['name']}:value" in shards.column_names:
            floats.append(padded(f"{step['name']}:value", size=size, nothing=0, kind=np.float32))
    return np.concatenate(ids, axis=1), np.concatenate(floats, axis=1)


def python(code: str, *arguments: str) -> str:
    """What the code prints in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_row_by_row_serving_gives_the_folders_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are packed one by one as at a client, and transformed one by one as in a bundle: its files alone, in a
    process that loads nothing else of ours; neither loads an engine."""
    monkeypatch.chdir(tmp_path)
    write(ROWS)
    made = spec()
    manifest = run(made, Path("d"), report=silent)
    transform = Transform.load(Path("d/transform"))
    raw = read_raw_split(made, "test")
    pq.write_table(raw, "raw.parquet")
    parts, at_once = len(os.sched_getaffinity(0)), pack(raw, transform.signature)
    packed = {"keys": np.empty_like(at_once.keys), "numbers": np.empty_like(at_once.numbers)}
    with ThreadPoolExecutor(parts) as pool:
        lines = [("d/transform/transform.json", "raw.parquet", str(part), str(parts)) for part in range(parts)]
        assert list(pool.map(lambda line: python(CLIENT, *line), lines)) == ["['etl']\n"] * parts
    for part in range(parts):
        one_by_one = np.load(f"packed{part}.npz")
        for kind, rows in packed.items():
            rows[part::parts] = one_by_one[kind]
    np.testing.assert_array_equal(packed["keys"], at_once.keys)
    np.testing.assert_array_equal(packed["numbers"], at_once.numbers)
    np.savez("packed.npz", keys=packed["keys"], numbers=packed["numbers"])
    write_slots(Path("d/transform"))
    copied = Path("copied")
    copied.mkdir()
    for name in ("lookup.py", "transform.py"):
        shutil.copyfile(ROOT / "etl" / name, copied / name)
    assert python(SERVER, str(copied), "d/transform", "packed.npz", "served.npz") == "[]\n"
    served, (ids, floats) = np.load("served.npz"), folder_rows(Path("d/test"), transform)
    assert len(ids) == ROWS and served["ids"].dtype == np.int64 and served["floats"].dtype == np.float32
    np.testing.assert_array_equal(served["ids"], ids)
    np.testing.assert_array_equal(served["floats"].view(np.uint32) & 0x7FFFFFFF, floats.view(np.uint32) & 0x7FFFFFFF)
    np.testing.assert_array_equal(served["floats"], floats)
    counts = manifest["splits"]["test"]["features"]
    assert counts["user"]["unseen"] and counts["user"]["missing"] and counts["city"]["unseen"]


@pytest.mark.parametrize(
    ("feature", "column"),
    [
        ({"type": "numeric", "name": "plain", "scale": "none"}, "plain"),
        ({"type": "numeric", "name": "plain", "as": "field", "scale": "none"}, "plain"),
        ({"type": "bag", "name": "tags", "max_length": 4, "weight_column": "weights"}, "weights"),
    ],
)
def test_numbers_beyond_float32_are_a_fault(
    feature: dict[str, Any], column: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the raw rows are encoded and where they are scored; float32's own ends are not."""
    monkeypatch.chdir(tmp_path)
    write(50)
    made = spec(features=[feature])
    run(made, Path("d"), report=silent)
    rows = pq.read_table("test.parquet")
    values = rows[column].to_pylist()
    at = next(at for at, value in enumerate(values) if value)
    values[at] = [1e39, *values[at][1:]] if column == "weights" else -1e39
    name = feature["name"]
    said = f"got feature '{name}' leaves the range of float32 at row %d; wanted finite inputs; remedy: "
    bad = rows.set_column(rows.schema.get_field_index(column), column, pa.array(values, rows.schema.field(column).type))
    with pytest.raises(Fault, match=said % 0):
        encode(bad.slice(at, 1).select(list(made.raw_columns())), Transform.load(Path("d/transform")), place="rows")
    pq.write_table(bad, "test.parquet")
    with pytest.raises(Fault, match="^test rows 1 to 50: " + said % at):
        run(made, Path("e"), report=silent)
    assert not Path("e").exists()
