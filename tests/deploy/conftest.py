"""A tiny trained run and its bundle, made once; whoever changes a bundle changes a copy."""

import csv
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[2]

EXPERIMENT = """
name = "tiny"
seed = 3

[data]
train = ["{folder}/train.csv"]
test = ["{folder}/test.csv"]
split = {{ valid_fraction = 0.2, seed = 1 }}

[[tasks]]
name = "click"

[[tasks]]
name = "buy"

[[features]]
type = "categorical"
columns = ["site", "city"]

[[features]]
type = "categorical"
name = "item"
dtype = "int64"
min_count = 2

[[features]]
type = "numeric"
as = "buckets"
name = "age_bucket"
column = "age"
boundaries = [20, 40, 60]

[[features]]
type = "numeric"
columns = ["age", "price"]

[[features]]
type = "cross"
name = "site_x_city"
inputs = ["site", "city"]
hash_rows = 50
linear_only = true

[model]
kind = "wide_deep"
hidden = [16]

[embedding]
dim = 4

[train]
batch_size = 64
epochs = 1

[export]
golden_rows = 10

[serve]
max_batch_size = 32
user = ["site", "age"]
max_candidates = 100
"""


LISTS = """
name = "lists"
seed = 3

[data]
format = "parquet"
train = ["{folder}/train.parquet"]
test = ["{folder}/test.parquet"]

[[tasks]]
name = "click"

[[features]]
type = "categorical"
name = "item"
dtype = "int64"

[[features]]
type = "sequence"
name = "history"
table = "item"
dtype = "int64"
max_length = 4

[[features]]
type = "bag"
name = "tags"
max_length = 3
weight_column = "tag_weights"
combiner = "mean"

[[features]]
type = "numeric"
name = "price"
as = "field"

[model]
kind = "din"
hidden = [16]
attention = [{{ query = ["item"], keys = ["history"] }}]

[embedding]
dim = 8
init_std = 0.3
optimizer = "adam"
learning_rate = 0.01

[train]
batch_size = 64
epochs = 8
learning_rate = 0.01

[serve]
max_batch_size = 32
user = ["history", "tags", "tag_weights"]
"""


def raw_lists(rows: int, *, seed: int) -> pa.Table:
    """A click is likely where the item is in the history; some bags and histories are empty, null or too long."""
    rng = np.random.default_rng(seed)
    history = [rng.integers(0, 20, rng.integers(0, 7)).tolist() for _ in range(rows)]
    item = [int(rng.choice(past)) if past and rng.random() < 0.5 else int(rng.integers(0, 20)) for past in history]
    tags = [rng.choice(list("abcé"), rng.integers(0, 4)).tolist() for _ in range(rows)]
    click = [float(rng.random() < (0.9 if it in past else 0.1)) for it, past in zip(item, history, strict=True)]
    columns = {
        "item": pa.array(item),
        "history": pa.array([past or None for past in history], pa.list_(pa.int64())),
        "tags": pa.array(tags, pa.list_(pa.string())),
        "tag_weights": pa.array([rng.random(len(each)).tolist() for each in tags], pa.list_(pa.float64())),
        "price": pa.array(rng.random(rows)),
        "click": pa.array(click),
    }
    return pa.table(columns)


@dataclass(frozen=True)
class Served:
    """Addresses of a server: gRPC, HTTP and metrics, each as HOST:PORT."""

    url: str
    http: str
    metrics: str


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a tiny experiment, trained for one epoch."""
    folder = tmp_path_factory.mktemp("tiny")
    generator = random.Random(1)
    for name, rows in (("train", 600), ("test", 150)):
        _write_rows(folder / f"{name}.csv", rows=rows, generator=generator)
    experiment = folder / "tiny.toml"
    experiment.write_text(EXPERIMENT.format(folder=folder))
    command("etl", "run", experiment, "--out", folder / "data")
    command("recsys", "train", experiment, "--data", folder / "data", "--run", folder / "run")
    return folder / "run"


@pytest.fixture(scope="session")
def exported(run_folder: Path) -> Path:
    """The run's bundle; read only."""
    bundle = run_folder.parent / "bundle"
    command("deploy", "export", run_folder, "--out", bundle)
    return bundle


@pytest.fixture(scope="session")
def lists_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with bags and histories, whose run and raw files lie beside it; read only."""
    folder = tmp_path_factory.mktemp("lists")
    for name, rows, seed in (("train", 3000, 1), ("test", 300, 2)):
        pq.write_table(raw_lists(rows, seed=seed), folder / f"{name}.parquet")
    experiment = folder / "lists.toml"
    experiment.write_text(LISTS.format(folder=folder))
    command("etl", "run", experiment, "--out", folder / "data")
    command("recsys", "train", experiment, "--data", folder / "data", "--run", folder / "run")
    command("deploy", "export", folder / "run", "--out", folder / "bundle")
    return folder / "bundle"


@pytest.fixture(scope="session")
def lists_served(lists_bundle: Path) -> Iterator[Served]:
    """Two instances of it."""
    from tests.deploy.test_serving import serving

    with serving(lists_bundle, "--instances", 2) as (_, url):
        state = json.loads((lists_bundle.parent / "server.json").read_text())
        yield Served(url, f"127.0.0.1:{state['http_port']}", f"127.0.0.1:{state['metrics_port']}")


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, for one test."""
    return shutil.copytree(exported, tmp_path / "home" / "bundle")


@pytest.fixture
def one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients of this process send each request once: one that fails is seen to fail."""

    def never(error: Exception, *, attempt: int, left_s: float) -> None:
        return None

    monkeypatch.setattr("deploy.client.pause_s", never)


def command(module: str, *arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{module} {arguments}\n{done.stdout}\n{done.stderr}"


def _write_rows(path: Path, *, rows: int, generator: random.Random) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["site", "city", "item", "age", "price", "click", "buy"])
        for _ in range(rows):
            site, item, age = generator.choice("abcde"), generator.randrange(30), generator.randrange(10, 90)
            click = int(generator.random() < (0.7 if site in "ab" else 0.2))
            city = generator.choice(["Berlin", "Kraków", ""])
            price = round(generator.expovariate(0.1), 2)
            writer.writerow([site, city, item, age, price, click, int(click and item % 2)])
