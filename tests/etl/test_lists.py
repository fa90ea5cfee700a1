"""Bags, sequences, numbers as fields, shared tables, groups and tasks that imply each other."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etl.experiment_file import parse
from etl.faults import Fault, Faults
from etl.pack import pack, text_keys
from etl.run import run
from etl.spec import FeatureSpec
from etl.transform import MISSING_KEY, MISSING_NUMBER, NO_KEY, Signature

SPEC: dict[str, Any] = {
    "data": {"format": "parquet", "train": ["train.parquet"], "valid": ["train.parquet"], "test": ["test.parquet"]},
    "tasks": [{"name": "click"}, {"name": "buy", "given": "click", "implies": "click"}],
    "features": [
        {"type": "categorical", "name": "item", "dtype": "int64"},
        {"type": "sequence", "name": "history", "table": "item", "dtype": "int64", "max_length": 2},
        {"type": "bag", "name": "tags", "max_length": 3, "weight_column": "tag_weights", "combiner": "mean"},
        {"type": "numeric", "name": "price", "as": "field", "standardize": False},
    ],
}
BIG = 2**62 + 1
TRAIN = {
    "item": [BIG, BIG + 1, BIG],
    "history": [[1, 2, BIG], [], None],
    "tags": [["a", "b"], [], ["a", None]],
    "tag_weights": [[1.0, 0.5], [], [2.0, 3.0]],
    "price": [1.5, None, 2.5],
    "click": [1, 0, 1],
    "buy": [0, 0, 1],
    "user": ["u", "v", None],
}
TEST = TRAIN | {"item": [BIG + 7, BIG, BIG], "tags": [["c"], ["a"], []], "tag_weights": [[4.0], [1.0], []]}


def spec(**data: Any) -> FeatureSpec:
    return parse(SPEC | {"data": SPEC["data"] | data}, place="lists.toml", into=FeatureSpec)


def write(folder: Path, train: dict[str, Any], test: dict[str, Any]) -> None:
    for name, columns in (("train", train), ("test", test)):
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")


def silent(stage: str, rows: int, *, total: int | None = None) -> None:
    """Nobody watches."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, TRAIN, TEST)
    return tmp_path


def test_lists_values_and_shared_tables_reach_the_shards(folder: Path) -> None:
    manifest = run(spec(group="user"), folder / "data", report=silent)
    train, test = (pq.read_table(folder / "data" / split).to_pydict() for split in ("train", "test"))
    vocabulary = pq.read_table(folder / "data/transform/vocabulary/item.parquet").to_pydict()
    assert vocabulary["value"] == [BIG, 2, BIG + 1, 1] or vocabulary["value"][0] == BIG
    row = dict(zip(vocabulary["value"], vocabulary["row"], strict=True))
    assert row[BIG] == 1 and sorted(row.values()) == [1, 2, 3, 4]
    assert train["item"] == [row[BIG], row[BIG + 1], row[BIG]]
    assert train["history"] == [[row[2], row[BIG]], [], []], "the newest two are kept"
    assert train["tags"] == [[1, 2], [], [1, 0]], "a null within a list is missing, not absent"
    assert train["tags:value"] == [[1.0, 0.5], [], [2.0, 3.0]]
    assert train["price"] == [1, 1, 1] and train["price:value"] == [1.5, 2.0, 2.5], "filled by the mean"
    assert test["item"][0] == 0 and test["tags"][0] == [0]
    assert len(set(train["group:"])) == 3
    counted = manifest["splits"]["test"]["features"]
    assert (counted["item"]["unseen"], counted["tags"]["unseen"], counted["tags"]["missing"]) == (1, 1, 0)
    assert manifest["splits"]["train"]["features"]["tags"] == {"missing": 1, "unseen": 0}
    schema = json.loads((folder / "data" / "schema.json").read_text())
    assert [table["name"] for table in schema["tables"]] == ["item", "tags", "price"]
    assert schema["tasks"][1]["given"] == "click"


def test_text_files_part_lists_by_a_separator(folder: Path) -> None:
    (folder / "train.csv").write_text(
        "item,history,tags,tag_weights,price,click,buy\n1,1|2|3,a|b,1|0.5,1.5,1,1\n2,,,,,0,0\n"
    )
    data = {"format": "csv", "train": ["train.csv"], "valid": ["train.csv"], "test": ["train.csv"]}
    run(spec(**data), folder / "data", report=silent)
    train = pq.read_table(folder / "data" / "train").to_pydict()
    assert train["tags"] == [[1, 2], []] and train["tags:value"] == [[1.0, 0.5], []]
    assert len(train["history"][0]) == 2 and train["history"][1] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tags": [["a"] * 4, [], []], "tag_weights": [[1.0] * 4, [], []]},
            r"train.parquet: rows 1 to 3, column 'tags': got 4 values in row 1 of these; wanted at most 3",
        ),
        ({"tags": [["a"], [], []]}, "column 'tag_weights': got another number than of ids in row 1"),
        ({"tag_weights": [[1.0, None], [], [1.0, 1.0]]}, "column 'tag_weights': got null, NaN or infinity"),
        ({"history": [[1.5], [], []]}, "holds double, wanted int64"),
        ({"history": [1, 2, 3]}, "holds int64, wanted list<int64>"),
        ({"buy": [1, 1, 1]}, "1 rows with 'buy' 1 and 'click' 0"),
    ],
)
def test_lists_that_make_no_sense_leave_nothing(folder: Path, change: dict[str, Any], message: str) -> None:
    write(folder, TRAIN | change, TEST)
    with pytest.raises(Fault, match=message):
        run(spec(), folder / "data", report=silent)
    assert not (folder / "data").exists()


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([{"type": "sequence", "name": "h"}], "max_length"),
        (
            [
                {"type": "categorical", "name": "a", "table": "t", "min_count": 2},
                {"type": "categorical", "name": "b", "table": "t"},
            ],
            "share the table 't' and have to agree",
        ),
        (
            [
                {"type": "sequence", "name": "a", "column": "c", "max_length": 2},
                {"type": "bag", "name": "b", "column": "c", "max_length": 3},
            ],
            "column 'c' is read with two values of max_length",
        ),
        (
            [
                {"type": "categorical", "name": "a", "table": "price"},
                {"type": "numeric", "name": "price", "as": "field"},
            ],
            "table 'price' has the name of another feature's own table",
        ),
    ],
)
def test_features_that_do_not_fit_together(features: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(Faults, match=message):
        parse(SPEC | {"features": features}, place="lists.toml", into=FeatureSpec)


lists = st.lists(st.lists(st.none() | st.integers(-(2**63) + 2, 2**63 - 1), max_size=6) | st.none(), max_size=8)


@given(rows=lists, slots=st.integers(1, 4))
def test_packing_a_sequence_keeps_the_newest_and_says_where_it_ends(rows: list[Any], slots: int) -> None:
    signature = Signature({"h": "list<int64>"}, ("h",), (), {"h": slots}, ("h",))
    packed = pack(pa.table({"h": pa.array(rows, pa.list_(pa.int64()))}), signature)
    for row, keys in zip(rows, packed.keys.tolist(), strict=True):
        kept = [MISSING_KEY if value is None else value for value in (row or [])][-slots:]
        assert keys == kept + [NO_KEY] * (slots - len(kept))


@given(rows=st.lists(st.lists(st.floats(-1e9, 1e9) | st.none(), max_size=3), max_size=6))
def test_packing_weights_marks_what_is_not_there(rows: list[list[float | None]]) -> None:
    signature = Signature({"w": "list<float64>"}, (), ("w",), {"w": 3}, ())
    packed = pack(pa.table({"w": pa.array(rows, pa.list_(pa.float64()))}), signature)
    for row, numbers in zip(rows, packed.numbers.tolist(), strict=True):
        assert numbers == [MISSING_NUMBER if v is None else v for v in row] + [MISSING_NUMBER] * (3 - len(row))


@given(values=st.lists(st.text(max_size=4), min_size=1, max_size=30))
def test_a_shared_vocabulary_counts_all_its_columns(
    values: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shared")
    half = len(values) // 2
    labels = [float(at % 2) for at in range(len(values) + 2)]
    table = pa.table(
        {
            "one": pa.array([*values, None, None], pa.string()),
            "many": pa.array([values[:half], *[[]] * (len(values) + 1)], pa.list_(pa.string())),
            "click": pa.array(labels),
        }
    )
    pq.write_table(table, folder / "rows.parquet")
    files = {name: [str(folder / "rows.parquet")] for name in ("train", "valid", "test")}
    raw = {
        "data": {"format": "parquet"} | files,
        "tasks": [{"name": "click"}],
        "features": [
            {"type": "categorical", "name": "one", "table": "t"},
            {"type": "bag", "name": "many", "table": "t", "max_length": 30},
        ],
    }
    run(parse(raw, place="x", into=FeatureSpec), folder / "data", report=silent)
    found = pq.read_table(folder / "data/transform/vocabulary/t.parquet").to_pydict()
    counts = Counter(values) + Counter(values[:half])
    wanted = sorted(counts, key=lambda value: (-counts[value], value))
    assert found["value"] == wanted and found["count"] == [counts[value] for value in wanted]
    assert found["key"] == text_keys(pa.array(wanted, pa.large_string())).tolist()
    one = pq.read_table(folder / "data" / "train")["one"].to_pylist()
    assert one == [wanted.index(value) + 1 for value in values] + [0, 0]
    assert np.all(np.diff(found["row"]) == 1)
