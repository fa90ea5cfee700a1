"""How training files are divided, and that the raw rows of a split are those of the dataset folder."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etl.experiment_file import parse
from etl.faults import Fault, Faults
from etl.run import run, up_to_date
from etl.sources import read_raw_split
from etl.spec import FeatureSpec
from etl.splits import SPLITS, kth
from etl.stage import stage
from etl.transform import Int64s

ROWS = 1000
SPEC: dict[str, Any] = {
    "tasks": [{"name": "click"}],
    "features": [
        {"type": "categorical", "name": "row", "dtype": "int64"},
        {"type": "categorical", "name": "user"},
        {"type": "categorical", "name": "time", "dtype": "int64"},
    ],
}
HERE = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
RNG = np.random.default_rng(0)
TIMES = RNG.integers(0, 400, ROWS)
USERS = [f"u{user}" if user else None for user in RNG.integers(0, 60, ROWS)]


def silent(stage: str, rows: int, *, total: int | None = None) -> None:
    """Nobody watches."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(range(0, 600), "day1.parquet")
    write(range(600, ROWS), "day2.parquet")
    return tmp_path


def write(rows: range, path: str) -> None:
    columns = {"row": list(rows), "user": [USERS[row] for row in rows], "time": TIMES[list(rows)]}
    pq.write_table(pa.table(columns | {"click": [row % 2 for row in rows]}), path)


def spec(split: dict[str, Any], **data: Any) -> FeatureSpec:
    raw = {"format": "parquet", "train": ["day*.parquet"], "split": split} | data
    return parse(SPEC | {"data": raw}, place="x.toml", into=FeatureSpec)


def rows(spec: FeatureSpec) -> list[list[int]]:
    """The rows of each split, by their number."""
    Path("raw").mkdir(exist_ok=True)
    stage(spec, Path("raw"), report=silent)
    assert sorted(path.name for path in Path("raw").iterdir()) == ["test.parquet", "train.parquet", "valid.parquet"]
    return [pq.read_table(f"raw/{split}.parquet")["row"].to_pylist() for split in SPLITS]


WAYS: dict[str, dict[str, Any]] = {
    "row": {"valid_fraction": 0.2, "test_fraction": 0.1, "seed": 3},
    "group": {"by": "group", "column": "user", "valid_fraction": 0.2, "test_fraction": 0.1},
    "time": {"by": "time", "column": "time", "valid_fraction": 0.2, "test_fraction": 0.1},
    "bounds": {"by": "time", "column": "time", "valid_from": 300, "test_from": 350},
    "last": {"by": "last", "column": "user", "time": "time"},
}


@pytest.mark.parametrize("way", WAYS)
def test_each_row_is_in_one_split_and_keeps_its_place(folder: Path, way: str) -> None:
    parts = rows(spec(WAYS[way]))
    assert sorted(row for part in parts for row in part) == list(range(ROWS))
    assert all(part == sorted(part) and part for part in parts)
    if way in ("row", "time"):
        assert 150 < len(parts[1]) < 250 and 60 < len(parts[2]) < 140
    if way == "bounds":
        assert parts[1] == np.flatnonzero((TIMES >= 300) & (TIMES < 350)).tolist()
        assert parts[2] == np.flatnonzero(TIMES >= 350).tolist()


@pytest.mark.parametrize("way", WAYS)
def test_the_raw_rows_of_a_split_are_those_of_the_folder(folder: Path, way: str) -> None:
    made = spec(WAYS[way])
    run(made, folder / "data", report=silent)
    words = pq.read_table(folder / "data/transform/vocabulary/time.parquet").to_pydict()
    row = dict(zip(words["value"], words["row"], strict=True))
    for split in SPLITS:
        raw = read_raw_split(made, split)
        encoded = pq.read_table(folder / "data" / split)
        assert [row.get(time, 0) for time in raw["time"].to_pylist()] == encoded["time"].to_pylist()
        assert raw["row"].to_pylist() == rows(made)[SPLITS.index(split)]


def test_a_group_is_in_one_split_only(folder: Path) -> None:
    users = [{USERS[row] for row in part} for part in rows(spec(WAYS["group"]))]
    assert not users[0] & users[1] and not users[0] & users[2] and not users[1] & users[2]
    assert users != [{USERS[row] for row in part} for part in rows(spec(WAYS["group"] | {"seed": 1}))]


def test_no_row_in_training_is_later_than_one_held_out(folder: Path) -> None:
    train, valid, test = rows(spec(WAYS["time"]))
    assert TIMES[train].max() < TIMES[valid].min() and TIMES[valid].max() < TIMES[test].min()
    assert len(test) >= 100 and (TIMES[test] > TIMES[test].min()).sum() < 100, "the share, and what has the same time"


def test_the_last_rows_of_each_user_are_held_out(folder: Path) -> None:
    parts = rows(spec(WAYS["last"]))
    for user in set(USERS) - {None}:
        own = sorted((row for row in range(ROWS) if USERS[row] == user), key=lambda row: (TIMES[row], row))
        assert [row for row in parts[2] if USERS[row] == user] == own[-1:]
        assert [row for row in parts[1] if USERS[row] == user] == own[-2:-1]
    assert all(row in parts[0] for row in range(ROWS) if USERS[row] is None)


def test_files_beside_a_split(folder: Path) -> None:
    write(range(0, 10), "extra.parquet")
    split = {"by": "time", "column": "time", "valid_fraction": 0.1}
    train, valid, test = rows(spec(split, test=["extra.parquet"]))
    assert test == list(range(10)) and len(train) + len(valid) == ROWS
    train, valid, test = rows(spec(split | {"test_fraction": 0.3}, valid=["extra.parquet"]))
    assert valid == list(range(10)) and len(train) + len(test) == ROWS and len(test) >= 300


def test_the_old_way_divides_as_before(folder: Path) -> None:
    """Golden: experiments that were trained with a split by row keep their rows."""
    write(range(0, 10), "extra.parquet")
    valid = rows(spec({"valid_fraction": 0.01, "seed": 1}, test=["extra.parquet"]))[1]
    assert valid == [155, 178, 320, 505, 765, 850, 901, 942, 966]


def test_changed_raw_files_are_noticed(folder: Path) -> None:
    made = spec(WAYS["time"])
    run(made, folder / "data", report=silent)
    assert up_to_date(made, folder / "data")
    write(range(0, 10), "day3.parquet")
    assert not up_to_date(made, folder / "data")


int64s = st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=60, deadline=None)
@given(numbers=st.lists(int64s | st.integers(-3, 3), min_size=1, max_size=50), data=st.data())
def test_kth_is_the_sorted_one(numbers: list[int], data: st.DataObject) -> None:
    def chunks() -> Iterator[Int64s]:
        for at in range(0, len(numbers), 7):
            yield np.array(numbers[at : at + 7], np.int64)

    k = data.draw(st.integers(0, len(numbers) - 1))
    assert kth(chunks, k) == sorted(numbers)[k]


@pytest.mark.parametrize(
    ("split", "data", "message"),
    [
        ({}, {}, "give 'test' files, or split.test_fraction"),
        ({"test_fraction": 0.1}, {"test": ["day1.parquet"]}, "drop split.test_fraction"),
        ({"by": "time", "test_fraction": 0.1}, {}, "'column' goes with"),
        ({"column": "time", "test_fraction": 0.1}, {}, "'column' goes with"),
        ({"by": "last", "column": "user"}, {}, "'time' goes with by = 'last'"),
        ({"valid_from": 3, "test_from": 4}, {}, "go with by = 'time'"),
        ({"by": "time", "column": "time", "test_from": 4}, {}, "valid_from goes with"),
        ({"valid_fraction": 0.5, "test_fraction": 0.5}, {}, "leave no row for training"),
        ({"by": "day", "test_fraction": 0.1}, {}, "split.by"),
    ],
)
def test_splits_that_make_no_sense(split: dict[str, Any], data: dict[str, Any], message: str) -> None:
    with pytest.raises(Faults, match=message):
        spec(split, **data)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"by": "time", "column": "time", "valid_from": 350, "test_from": 300}, "starts after validation"),
        ({"by": "time", "column": "time", "valid_from": "2024-01-01", "test_from": 350}, "got times without a zone"),
        ({"by": "time", "column": "time", "valid_from": 300, "test_from": 500}, "data.test: got no rows"),
        ({"by": "time", "column": "when", "test_fraction": 0.1}, "no column when"),
        ({"by": "group", "column": "when", "test_fraction": 0.1}, "no column when"),
    ],
)
def test_splits_that_the_rows_do_not_allow(folder: Path, split: dict[str, Any], message: str) -> None:
    with pytest.raises(Fault, match=message):
        rows(spec(split))


PEAK = """
import resource, sys
from pathlib import Path
from etl.spec import FeatureSpec
from etl.stage import stage
stage(FeatureSpec.model_validate_json(sys.argv[1]), Path("raw"), report=lambda stage, rows, total=None: None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["row", "group", "time"])
def test_memory_does_not_grow_with_the_rows(folder: Path, way: str) -> None:
    """Peak MB of a fresh process; eight times the rows are 70 MB more of data."""
    peaks = []
    for times in (300, 2400):
        table = pa.concat_tables([pq.read_table("day1.parquet"), pq.read_table("day2.parquet")])
        with pq.ParquetWriter("big.parquet", table.schema) as writer:
            for _ in range(times // 100):
                writer.write_table(pa.concat_tables([table] * 100).combine_chunks())
        Path("raw").mkdir(exist_ok=True)
        given = spec(WAYS[way], train=["big.parquet"]).model_dump_json(by_alias=True)
        done = subprocess.run(
            [sys.executable, "-c", PEAK, given], capture_output=True, text=True, check=False, env=HERE
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 25, peaks
