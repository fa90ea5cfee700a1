"""A second day: the tables of the first grow, training starts from its run, on another number of ranks."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recsys.checkpoint import best
from recsys.parallel.state import read_tensors
from recsys.progress import quiet_libraries

pytestmark = [pytest.mark.slow, pytest.mark.dist]
ROOT = Path(__file__).parents[2]
EXPERIMENT = """
name = "days"
[data]
train = ["day1.parquet"]
valid = ["valid.parquet"]
test = ["valid.parquet"]
format = "parquet"
[[features]]
type = "categorical"
columns = ["user", "item"]
[[features]]
type = "categorical"
name = "page"
hash_rows = 40
[[tasks]]
name = "click"
[model]
kind = "deepfm"
hidden = [16]
[train]
batch_size = 256
epochs = 3
[embedding]
optimizer = "adam"
learning_rate = 0.02
dim = 8
sharding = "table_wise"
"""


def write_day(path: Path, *, users: range, items: range, rows: int, seed: int) -> None:
    """Clicks of a chance that user and item decide, each by its name."""
    rng = np.random.default_rng(seed)
    weights = {name: np.random.default_rng(1).normal(size=400) * 1.5 for name in ("user", "item")}
    user, item = rng.choice(users, rows), rng.choice(items, rows)
    chance = 1 / (1 + np.exp(-(weights["user"][user] + weights["item"][item])))
    columns = {"user": [f"u{at}" for at in user], "item": [f"i{at}" for at in item]}
    columns |= {"page": [f"p{at}" for at in rng.integers(0, 90, rows)]}
    pq.write_table(pa.table(columns | {"click": (rng.random(rows) < chance).astype(np.int64)}), path)


def command(folder: Path, *arguments: str, ranks: int = 1) -> str:
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    line = [sys.executable, *start, "-m", *arguments]
    done = subprocess.run(
        line, cwd=folder, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stderr


def keys(run: Path, table: str) -> list[str]:
    return pq.read_table(run / "transform" / "vocabulary" / f"{table}.parquet")["value"].to_pylist()


def first_loss(run: Path) -> float:
    return float(json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"])


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first day trained, the second one's data made as its extension."""
    folder = tmp_path_factory.mktemp("days")
    (folder / "days.toml").write_text(EXPERIMENT)
    write_day(folder / "day1.parquet", users=range(200), items=range(50), rows=12_000, seed=2)
    write_day(folder / "day2.parquet", users=range(100, 300), items=range(25, 75), rows=12_000, seed=3)
    write_day(folder / "valid.parquet", users=range(100, 300), items=range(25, 75), rows=3_000, seed=4)
    command(folder, "etl", "run", "days.toml", "--out", "data1")
    command(folder, "recsys", "train", "days.toml", "--data", "data1", "--run-dir", "run1")
    second = ("--set", 'data.train=["day2.parquet"]')
    command(folder, "etl", "run", "days.toml", *second, "--extend", "data1", "--out", "data2")
    return folder


def train_second(days: Path, run: str, *settings: str, ranks: int = 1) -> Path:
    sets = ['data.train=["day2.parquet"]', *settings]
    flags = [part for setting in sets for part in ("--set", setting)]
    line = ["recsys", "train", "days.toml", "--data", "data2", "--run-dir", run, *flags]
    command(days, *line, ranks=ranks)
    return days / run


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_second_day_starts_where_the_first_ended(days: Path, ranks: int) -> None:
    batch = f"train.batch_size={256 // ranks}"
    warm = train_second(days, f"warm{ranks}", "train.start_from=run1", batch, ranks=ranks)
    cold = train_second(days, f"cold{ranks}", batch, ranks=ranks)
    old, new = (keys(days / "run1", "user"), keys(warm, "user"))
    assert new[: len(old)] == old and len(new) > len(old)
    start = json.loads((warm / "start.json").read_text())
    assert start["tables"]["user"] == {"rows": len(new) + 1, "rows_taken": len(old) + 1, "states_taken": True}
    assert start["tables"]["page"] == {"rows": 40, "rows_taken": 40, "states_taken": True}
    assert not start["dense"]["initialised"]
    uses = json.loads((warm / "tables.json").read_text())
    seen = {name: set(pq.read_table(days / "day2.parquet")[name].to_pylist()) for name in ("user", "item")}
    for name, values in seen.items():
        assert uses[name]["dead"] == len(set(keys(warm, name)) - values) + 1, "and the row of unseen values"
        assert uses[name]["lookups"] == 12_000
    assert first_loss(warm) < 0.9 * first_loss(cold)
    results = [json.loads((run / "result.json").read_text())["test"]["auc"] for run in (warm, cold)]
    assert results[0] > results[1] - 0.005


def test_frozen_tables_stay_also_on_a_rank_that_holds_no_others(days: Path) -> None:
    """Two ranks, whole tables: one of them gets frozen tables alone, and still has to take part in the exchange."""
    quiet_libraries()
    frozen = [f"embedding.tables.{name}.frozen=true" for name in ("user", "item", "page")]
    for count in (1, 2, 3):
        run = train_second(days, f"frozen{count}", "train.start_from=run1", *frozen[:count], "train.epochs=1", ranks=2)
        old, new = read_tensors(best(days / "run1")), read_tensors(best(run))
        for at, table in enumerate(("user", "item", "page")):
            name = f"model.tables.embedding_bags.{table}.weight"
            same = torch.equal(new[name][: len(old[name])], old[name])
            assert same == (at < count), (count, table)
            assert any(f"{table}.momentum1" in key for key in new) == (at >= count)


def test_another_days_rows_are_refused(days: Path) -> None:
    """Made without --extend, the second day numbers its values anew."""
    second = ("--set", 'data.train=["day2.parquet"]')
    command(days, "etl", "run", "days.toml", *second, "--out", "other")
    line = [sys.executable, "-m", "recsys", "train", "days.toml", "--data", "other", "--run-dir", "refused", *second]
    done = subprocess.run(
        [*line, "--set", "train.start_from=run1"],
        cwd=days,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "table 'user'" in done.stderr and "etl run --extend" in done.stderr and "Traceback" not in done.stderr
