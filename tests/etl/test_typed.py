"""Typed parquet without a staging copy: the same folder, byte for byte, and the same faults."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import etl.run
from etl.artifact import Json
from etl.experiment_file import parse
from etl.extend import read_parent
from etl.faults import Fault
from etl.run import run
from etl.spec import FeatureSpec
from etl.typed import typed_files

ROWS = {"day_0": 700, "day_1": 1, "day_2": 1500, "valid": 300, "test": 250}
SPEC: dict[str, Any] = {
    "data": {
        "format": "parquet",
        "train": ["day_*.parquet"],
        "valid": ["valid.parquet"],
        "test": ["test.parquet"],
        "group": "user",
    },
    "tasks": [
        {"name": "click"},
        {"name": "buy", "column": "bought", "positive": ["yes"], "negative": ["no"], "given": "click"},
    ],
    "features": [
        {"type": "categorical", "name": "user", "dtype": "int64", "min_count": 2, "max_rows": 40},
        {"type": "categorical", "name": "city"},
        {"type": "categorical", "name": "hashed", "column": "city", "hash_rows": 30},
        {"type": "bag", "name": "tags", "max_length": 4, "weight_column": "tag_weights"},
        {"type": "sequence", "name": "seen", "table": "user", "max_length": 3, "dtype": "int64", "min_count": 2,
         "max_rows": 40},
        {"type": "numeric", "name": "price", "fill": "median", "clip": [0.0, 1e6], "log1p": True},
        {"type": "numeric", "name": "age", "scale": "standardize"},
        {"type": "numeric", "name": "level", "column": "price", "as": "buckets", "quantiles": 5},
        {"type": "numeric", "name": "visits", "as": "field", "scale": "minmax"},
        {"type": "cross", "name": "city_x_level", "inputs": ["city", "level"], "hash_rows": 50},
        {"type": "target", "name": "rate", "by": ["city", "user"], "task": "buy"},
        {"type": "count", "name": "rows", "by": ["user"]},
    ],
    "etl": {"rows_per_group": 64, "rows_per_shard": 500},
}  # fmt: skip


def silent(stage: str, rows: int, *, total: int | None = None) -> None:
    """Nobody watches."""


def table(rows: int, *, seed: int) -> pa.Table:
    """Every kind of column, in types that differ from those that the transform reads."""
    rng = np.random.default_rng(seed)

    def some(values: list[Any], kind: pa.DataType) -> pa.Array:
        return pa.array([values[at] for at in rng.integers(0, len(values), rows)], kind)

    tags = [[["a", "ü", None, "d"][at] for at in rng.integers(0, 4, size)] for size in rng.integers(0, 5, rows)]
    users = [2**63 - 1, 2**63 - 2, 2**53 + 1, 2**53, -(2**62), 0, None]
    seen = [[users[at] for at in rng.integers(0, 6, size)] for size in rng.integers(0, 6, rows)]
    return pa.table(
        {
            "more": pa.array(np.arange(rows)),
            "user": some(users + list(range(1, 60)), pa.int64()),
            "city": some(["Bern", "Zürich", "", None, "東京", "nan"], pa.string()),
            "tags": pa.array(tags, pa.list_(pa.string())),
            "tag_weights": pa.array([[0.5] * len(row) for row in tags], pa.large_list(pa.float32())),
            "seen": pa.array([None if len(row) == 5 else row for row in seen], pa.list_(pa.int64())),
            "price": some([0.0, 1.5, 1e7, None, float("nan"), -3.0, 0.1, 2.7], pa.float32()),
            "age": pa.array(rng.normal(1e9, 1, rows), pa.float64()),
            "visits": some([1, 2, 250, None], pa.uint8()),
            "click": pa.array(rng.random(rows) < 0.5),
            "bought": some(["yes", "no"], pa.large_string()),
        }
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, (name, rows) in enumerate(ROWS.items()):
        pq.write_table(table(rows, seed=seed), f"{name}.parquet", row_group_size=190)
    return tmp_path


def spec(**changes: Any) -> FeatureSpec:
    return parse(SPEC | changes, place="x.toml", into=FeatureSpec)


def staged(spec: FeatureSpec, out: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Json:
    """The folder by way of a typed copy of the raw rows."""
    with monkeypatch.context() as patched:
        patched.setattr(etl.run, "typed_files", lambda spec, report: None)
        return run(spec, out, report=silent, **more)


def contents(folder: str) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*.*")}


def test_the_folder_is_that_of_the_staged_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = spec()
    assert typed_files(made, report=silent) is not None, "or this compares a way with itself"
    direct = run(made, Path("direct"), report=silent)
    assert direct == staged(made, Path("staged"), monkeypatch)
    assert contents("direct") == contents("staged") and len(contents("direct")) > 12
    assert direct["splits"]["train"]["rows"] == 2201
    sizes = [pq.ParquetFile(path).metadata for path in sorted(Path("direct/train").iterdir())]
    assert [size.num_rows for size in sizes] == [500] * 4 + [201] and sizes[0].row_group(1).num_rows == 64


def test_a_folder_is_extended_alike(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = spec(data=SPEC["data"] | {"train": ["day_0.parquet"]})
    run(first, Path("one"), report=silent)
    second = spec(data=SPEC["data"] | {"train": ["day_2.parquet"]})
    parent = read_parent(second, Path("one"), refit_numbers=True)
    run(second, Path("direct"), report=silent, parent=parent)
    staged(second, Path("staged"), monkeypatch, parent=parent)
    assert contents("direct") == contents("staged")


def column(name: str, values: list[Any], kind: pa.DataType) -> Callable[[], None]:
    def write() -> None:
        rows = pq.read_table("day_2.parquet")
        at = rows.schema.get_field_index(name)
        whole = pa.array([*values, *rows[name].to_pylist()[len(values) :]], kind)
        pq.write_table(rows.set_column(at, name, whole), "day_2.parquet")

    return write


@pytest.mark.parametrize(
    "change",
    [
        {"split": {"test_fraction": 0.1}, "test": []},
        {"histories": [{"user": "city", "time": "more", "columns": {"seen": "user"}, "max_length": 3}]},
        {"negatives": {"item": "city", "user": "user", "positive": "click"}},
    ],
)
def test_rows_that_are_made_from_others_are_staged(folder: Path, change: dict[str, Any]) -> None:
    assert typed_files(spec(data=SPEC["data"] | change), report=silent) is None


@pytest.mark.parametrize(
    "write",
    [
        column("visits", [], pa.int16()),
        column("city", [], pa.dictionary(pa.int32(), pa.string())),
        column("age", [], pa.float32()),
        column("bought", [], pa.dictionary(pa.int32(), pa.string())),
    ],
)
def test_other_types_are_staged(folder: Path, write: Callable[[], None]) -> None:
    write()
    assert typed_files(spec(), report=silent) is None


@pytest.mark.parametrize(
    ("write", "place", "got"),
    [
        (column("user", [-(2**63)], pa.int64()), "day_2.parquet: rows 1 to .*, column 'user'", "stands for missing"),
        (column("age", [float("inf")], pa.float64()), "day_2.parquet: rows 1 to .*, column 'age'", "infinity"),
        (column("tags", [["x"] * 9], pa.list_(pa.string())), "day_2.parquet: .*, column 'tags'", "9 values in row 1"),
        (column("bought", [None], pa.string()), "day_2.parquet: .*, column 'bought'", "None as label 1"),
        (
            lambda: Path("day_2.parquet").write_bytes(Path("day_2.parquet").read_bytes()[:-9]),
            "day_2.parquet",
            "Parquet",
        ),
    ],
)
def test_faults_are_those_of_the_staged_rows(
    folder: Path, write: Callable[[], None], place: str, got: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write()
    with pytest.raises(Fault, match=f"{place}: got .*{got}") as direct:
        run(spec(), Path("data"), report=silent)
    with pytest.raises(Fault) as by_copy:
        staged(spec(), Path("data"), monkeypatch)
    assert str(direct.value) == str(by_copy.value)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == []


def test_a_broken_page_is_a_fault(folder: Path) -> None:
    whole = bytearray(Path("day_2.parquet").read_bytes())
    start = pq.ParquetFile("day_2.parquet").metadata.row_group(3).column(1).data_page_offset
    whole[start : start + 40] = b"x" * 40
    Path("day_2.parquet").write_bytes(whole)
    with pytest.raises(Fault, match=r"day_2\.parquet"):
        run(spec(), Path("data"), report=silent)
    assert not Path("data").exists()
