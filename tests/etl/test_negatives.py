"""Drawn rows: never a taken item, whatever the batches, with the shares that were asked for."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etl import formats
from etl.experiment_file import parse
from etl.faults import Fault, Faults
from etl.run import run
from etl.sources import read_raw_split
from etl.spec import FeatureSpec
from etl.splits import SPLITS
from etl.stage import stage

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
SPEC: dict[str, Any] = {
    "tasks": [{"name": "click"}],
    "features": [
        {"type": "categorical", "name": "item", "dtype": "int64"},
        {"type": "categorical", "name": "category"},
        {"type": "sequence", "name": "past", "table": "item", "dtype": "int64", "max_length": 3},
        {"type": "categorical", "name": "user"},
    ],
}
HISTORY = {"user": "user", "time": "time", "max_length": 3, "columns": {"past": "item"}}
NEGATIVES = {"user": "user", "item": "item", "attributes": ["category"], "count": 2, "seed": 3}
FILES = {"train": ["train.parquet"], "valid": ["valid.parquet"], "test": ["test.parquet"]}


def silent(stage: str, rows: int, *, total: int | None = None) -> None:
    """Nobody watches."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, rows: list[tuple[str | None, int | None]], *, start: int = 0) -> None:
    table = pa.table(
        {
            "user": pa.array([user for user, _ in rows], pa.string()),
            "item": pa.array([item for _, item in rows], pa.int64()),
            "category": pa.array([None if item is None else f"c{item % 3}" for _, item in rows], pa.string()),
            "time": pa.array(range(start, start + len(rows)), pa.int64()),
        }
    )
    pq.write_table(table, path)


def spec(**negatives: Any) -> FeatureSpec:
    data = {"format": "parquet", "histories": [HISTORY], "negatives": NEGATIVES | negatives} | FILES
    return parse(SPEC | {"data": data}, place="x.toml", into=FeatureSpec)


def staged(spec: FeatureSpec) -> dict[str, list[dict[str, Any]]]:
    Path("raw").mkdir(exist_ok=True)
    stage(spec, Path("raw"), report=silent)
    return {split: pq.read_table(f"raw/{split}.parquet").to_pylist() for split in SPLITS}


users = st.sampled_from(["u", "v", "w", None])
logs = st.lists(st.tuples(users, st.none() | st.integers(0, 6) | st.just(2**62 + 1)), min_size=1, max_size=25)
REST = [("x", 100), ("y", 101)]  # each user lacks one of them


@settings(max_examples=50, deadline=None)
@given(
    train=logs, valid=logs, by=st.sampled_from(["uniform", "popularity"]), exclude=st.sampled_from(["user", "event"])
)
def test_a_negative_is_no_item_of_its_user(
    train: Any, valid: Any, by: str, exclude: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("log")
    train, test = [*train, *REST], [("v", 100), ("v", 0)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for at, (split, rows) in enumerate(zip(SPLITS, (train, valid, test), strict=True)):
            write(f"{split}.parquet", rows, start=100 * at)
        with_user = {"user": "user"} if exclude == "user" else {"user": None}
        found = staged(spec(by=by, exclude=exclude, **with_user))
    log = dict(zip(SPLITS, (train, valid, test), strict=True))
    pool = {item for _, item in train if item is not None}
    taken = {(user, item) for rows in log.values() for user, item in rows if user is not None}
    for split, rows in log.items():
        assert len(found[split]) == 3 * len(rows)
        for at, (user, item) in enumerate(rows):
            positive, *negatives = found[split][3 * at : 3 * at + 3]
            assert (positive["user"], positive["item"], positive["label:click"]) == (user, item, 1.0)
            for row in negatives:
                assert row["item"] in pool and row["item"] != item and row["label:click"] == 0.0
                assert exclude == "event" or (user, row["item"]) not in taken
                assert row["category"] == f"c{row['item'] % 3}", "attributes follow the item"
                assert row["past"] == positive["past"] and row["user"] == user


def test_draws_depend_on_seed_and_position_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for split in SPLITS:
        rows = [(f"u{u}", int(i)) for u, i in zip(rng.integers(0, 40, 300), rng.integers(0, 200, 300), strict=True)]
        write(f"{split}.parquet", rows)
    one = staged(spec())
    assert staged(spec()) == one and staged(spec(seed=4)) != one
    assert [row["item"] for row in one["valid"]] != [row["item"] for row in one["test"]]
    real = pq.ParquetFile.iter_batches

    def small(file: pq.ParquetFile, **options: Any) -> Any:
        return real(file, **options | {"batch_size": 7})

    monkeypatch.setattr(formats.pq.ParquetFile, "iter_batches", small)
    assert staged(spec()) == one


@pytest.mark.parametrize("by", ["uniform", "popularity"])
def test_items_come_in_their_shares(folder: Path, by: str) -> None:
    counts = {0: 500, 1: 250, 2: 125, 3: 125, 4: 1000}
    rows = [(f"u{at}" if item != 4 else "v", item) for item, n in counts.items() for at in range(n)]
    for split in SPLITS:
        write(f"{split}.parquet", rows if split == "train" else [("v", 4)] * 2000)
    found = Counter(row["item"] for row in staged(spec(by=by))["test"] if not row["label:click"])
    wanted = {item: n / 1000 if by == "popularity" else 0.25 for item, n in counts.items() if item != 4}
    assert set(found) == set(wanted)
    for item, share in wanted.items():
        assert abs(found[item] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5


def test_labels_that_the_files_hold(folder: Path) -> None:
    for split in SPLITS:
        write(f"{split}.parquet", [("u", 0), ("v", 1), ("u", 2)])
        table = pq.read_table(f"{split}.parquet")
        pq.write_table(table.append_column("click", pa.array([1, 0, 1])), f"{split}.parquet")
    rows = staged(spec(positive="click", count=1))["train"]
    assert [(row["item"], row["label:click"]) for row in rows] == [(0, 1), (1, 0), (1, 0), (2, 1), (1, 0)]


def test_a_user_with_every_item_is_a_fault_and_leaves_nothing(folder: Path) -> None:
    for split in SPLITS:
        write(f"{split}.parquet", [("u", 0), ("v", 1), ("u", 1)])
    with pytest.raises(Fault, match=r"user 'u' with rows of all 2 training items.*remedy"):
        run(spec(), folder / "data", report=silent)
    assert not list(folder.glob("*data*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user": None}, "'user' goes with exclude = 'user'"),
        ({"item": "thing"}, "no feature reads 'thing'"),
        ({"item": "past"}, "no feature reads 'past' from the files"),
        ({"attributes": ["item"]}, "other columns than 'item'"),
        ({"positive": "buy"}, "'buy' is no task"),
        ({"count": 0}, "negatives.count"),
    ],
)
def test_negatives_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(Faults, match=message):
        spec(**change)


def test_the_beauty_rows_that_a_script_makes_by_hand(folder: Path) -> None:
    """The positives and their histories are those of scripts/beauty.py, split by each user's last two events."""
    from beauty import split_rows

    rng = np.random.default_rng(1)
    taken = [rng.permutation(np.arange(1, 40))[: rng.integers(5, 12)].tolist() for _ in range(30)]
    lines = [f"{user},{at},{item},{item % 4}" for user, items in enumerate(taken) for at, item in enumerate(items)]
    Path("log.csv").write_text("\n".join(["user,at,item,category", *lines]) + "\n")
    data = {
        "train": ["log.csv"],
        "split": {"by": "last", "column": "user", "time": "at"},
        "histories": [
            {
                "user": "user",
                "time": "at",
                "columns": {"history": "item", "history_category": "category"},
                "max_length": 50,
                "min_length": 2,
            }
        ],
        "negatives": {"user": "user", "item": "item", "attributes": ["category"]},
    }
    features = [
        {"type": "categorical", "dtype": "int64", "columns": ["item", "category"]},
        {"type": "sequence", "name": "history", "table": "item", "dtype": "int64", "max_length": 50},
        {"type": "sequence", "name": "history_category", "table": "category", "dtype": "int64", "max_length": 50},
    ]
    beauty = parse({"data": data, "tasks": [{"name": "click"}], "features": features}, place="x", into=FeatureSpec)
    rows = staged(beauty)
    for split, wanted in split_rows(taken, items=40, seed=0).items():
        assert [row["label:click"] for row in rows[split]] == [label for _, _, label in wanted]
        assert [row["history"] for row in rows[split]] == [history for _, history, _ in wanted]
        assert [row["item"] for row in rows[split][::2]] == [item for item, _, label in wanted if label]
        assert all(row["history_category"] == [item % 4 for item in row["history"]] for row in rows[split])
        assert all(row["category"] == row["item"] % 4 for row in rows[split])
    run(beauty, folder / "data", report=silent)
    raw = read_raw_split(beauty, "test")
    assert raw.column_names == list(beauty.raw_columns())
    assert raw["item"].to_pylist() == [row["item"] for row in rows["test"]]
