"""A tiny trained run and its bundle, made once; whoever changes a bundle changes a copy."""

import csv
import random
import shutil
import subprocess
import sys
from pathlib import Path

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


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, for one test."""
    return shutil.copytree(exported, tmp_path / "home" / "bundle")


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
