"""Incremental days: no old row moves, counts add up, and nothing counts twice."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from etl.artifact import sha256
from etl.cli import app
from etl.engines.vocabulary import grown
from etl.experiment_file import parse
from etl.extend import read_parent
from etl.faults import Fault, Faults
from etl.folds import fold_of
from etl.run import run, up_to_date
from etl.spec import Categorical, FeatureSpec

SPEC: dict[str, Any] = {
    "tasks": [{"name": "click"}],
    "features": [
        {"type": "categorical", "name": "item", "min_count": 2},
        {"type": "categorical", "name": "user", "dtype": "int64", "max_rows": 4},
        {"type": "categorical", "name": "page", "hash_rows": 50},
        {"type": "bag", "name": "tags", "max_length": 3},
        {"type": "numeric", "name": "price"},
        {"type": "numeric", "name": "level", "column": "price", "as": "buckets", "quantiles": 3},
        {"type": "numeric", "name": "weight", "column": "price", "as": "field", "scale": "minmax"},
        {"type": "target", "name": "item_rate", "by": ["item"], "smoothing": 1.0, "folds": 3},
        {"type": "count", "name": "item_count", "by": ["item", "user"]},
    ],
}
DAY1 = {
    "item": ["a", "a", "a", "b", "b", "c", None, "d"],
    "user": [1, 1, 2, 2, 3, 3, 4, None],
    "page": ["p", "q", "p", "q", "p", "q", "p", "q"],
    "tags": [["x", "y"], ["x"], [], None, ["x"], ["y"], ["x"], ["x"]],
    "price": [1.0, 2.0, 3.0, None, 5.0, 6.0, 7.0, 8.0],
    "click": [1, 0, 1, 0, 1, 0, 1, 0],
}
DAY2 = {
    "item": ["e", "e", "e", "c", "b", "f", "é", "é"],
    "user": [9, 9, 9, 9, 1, None, 3, 3],
    "page": ["r", "q", "p", "q", "p", "q", "p", "q"],
    "tags": [["z", "y"], ["z"], [], None, ["w"], ["y"], ["x"], ["x"]],
    "price": [100.0, 200.0, 300.0, None, 500.0, 600.0, 700.0, 800.0],
    "click": [1, 1, 0, 0, 1, 0, 1, 0],
}


def spec(*train: str, **changes: Any) -> FeatureSpec:
    files = {"train": list(train), "valid": ["test.parquet"], "test": ["test.parquet"]}
    return parse(SPEC | {"data": {"format": "parquet"} | files} | changes, place="x.toml", into=FeatureSpec)


def silent(stage: str, rows: int, *, total: int | None = None) -> None:
    """Nobody watches."""


def extend(of: str, into: str, new: FeatureSpec, *, refit_numbers: bool = False) -> dict[str, Any]:
    return run(new, Path(into), report=silent, parent=read_parent(new, Path(of), refit_numbers=refit_numbers))


def fitted(folder: str) -> dict[str, bytes]:
    root = Path(folder)
    paths = [path for name in ("transform", "counts") for path in (root / name).rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def vocabulary(folder: str, table: str) -> dict[str, list[Any]]:
    return pq.read_table(f"{folder}/transform/vocabulary/{table}.parquet").to_pydict()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    types = {"item": pa.string(), "user": pa.int64(), "tags": pa.list_(pa.string())}
    for name, rows in (("day1", DAY1), ("day2", DAY2), ("test", DAY1)):
        pq.write_table(
            pa.table({key: pa.array(value, types.get(key)) for key, value in rows.items()}), f"{name}.parquet"
        )
    run(spec("day1.parquet"), Path("one"), report=silent)
    return tmp_path


def test_new_values_follow_the_old_rows(folder: Path) -> None:
    manifest = extend("one", "two", spec("day2.parquet"))
    item = vocabulary("two", "item")
    assert item["value"] == ["a", "b", "e", "c", "é"], "c had one row a day and has two now; d and f have one"
    assert item["count"] == [3, 3, 3, 2, 2] and item["row"] == [1, 2, 3, 4, 5]
    assert vocabulary("two", "user")["value"] == vocabulary("one", "user")["value"] == [1, 2, 3], "max_rows was reached"
    assert vocabulary("two", "user")["count"] == [3, 2, 4]
    assert vocabulary("two", "tags")["value"] == ["x", "y", "z", "w"]
    assert pq.read_table("two/counts/item.parquet").to_pydict() == {"value": ["d", "f"], "count": [1, 1]}
    added = manifest["extended"]["tables"]
    assert added == {"item": {"from": 3, "to": 6}, "user": {"from": 4, "to": 4}, "tags": {"from": 3, "to": 5}}
    tables = {table["name"]: table["rows"] for table in json.loads(Path("two/schema.json").read_text())["tables"]}
    assert tables["item"] == 6 and tables["page"] == 50
    train = pq.read_table("two/train").to_pydict()
    assert train["item"] == [3, 3, 3, 4, 2, 0, 5, 5]
    assert json.loads(Path("two/manifest.json").read_text())["extended"] == manifest["extended"]


def test_numbers_stay_or_are_refitted_and_buckets_stay(folder: Path) -> None:
    extend("one", "kept", spec("day2.parquet"))
    extend("one", "refitted", spec("day2.parquet"), refit_numbers=True)
    run(spec("day2.parquet"), Path("alone"), report=silent)
    one, kept, refitted, alone = (
        {step["name"]: step for step in state["features"] + state["dense"]}
        for state in (
            json.loads(fitted(name)["transform/transform.json"]) for name in ("one", "kept", "refitted", "alone")
        )
    )
    for name in ("price", "weight", "level"):
        assert kept[name] == one[name] != alone[name]
    assert refitted["price"] == alone["price"] and refitted["weight"] == alone["weight"]
    assert refitted["level"] == one["level"]


def test_encodings_of_two_days_are_those_of_both_at_once(folder: Path) -> None:
    extend("one", "two", spec("day2.parquet"))
    run(spec("day1.parquet", "day2.parquet"), Path("both"), report=silent)
    for name in ("item_rate", "item_count"):
        assert (
            fitted("two")[f"transform/encoding/{name}.parquet"] == fitted("both")[f"transform/encoding/{name}.parquet"]
        )
    assert pq.read_table("two/test")["item_rate"] == pq.read_table("both/test")["item_rate"]
    rows = list(zip(DAY1["item"] + DAY2["item"], DAY1["click"] + DAY2["click"], strict=True))
    step = next(s for s in json.loads(fitted("two")["transform/transform.json"])["dense"] if s["name"] == "item_rate")
    assert (step["rows"], step["ones"]) == (16, sum(click for _, click in rows))


def test_a_new_rows_number_sees_the_old_day_and_the_other_folds(folder: Path) -> None:
    extend("one", "two", spec("day2.parquet"))
    folds = fold_of(np.arange(8), seed=0, folds=3).tolist()
    found = pq.read_table("two/train")["item_rate"].to_pylist()
    day1 = list(zip(DAY1["item"], DAY1["click"], strict=True))
    day2 = list(zip(DAY2["item"], DAY2["click"], strict=True))
    for at, (item, _) in enumerate(day2):
        others = day1 + [row for row, fold in zip(day2, folds, strict=True) if fold != folds[at]]
        same = [click for value, click in others if value == item]
        rate = sum(click for _, click in others) / len(others)
        assert found[at] == pytest.approx((sum(same) + rate) / (len(same) + 1), rel=1e-6)


def test_nothing_new_gives_the_same_transform_and_the_same_rows(folder: Path) -> None:
    new = spec("day2.parquet")
    extend("one", "two", new)
    again = extend("two", "three", new)
    assert fitted("three") == fitted("two")
    assert all(table["from"] == table["to"] for table in again["extended"]["tables"].values())
    for split in ("train", "valid", "test"):
        assert pq.read_table(f"three/{split}") == pq.read_table(f"two/{split}")
    first = extend("one", "copy", spec("day1.parquet"))
    assert fitted("copy") == fitted("one") and pq.read_table("copy/train") == pq.read_table("one/train")
    assert len(first["counted"]) == 1 and len(again["counted"]) == 2


def test_a_folder_is_extended_in_its_place(folder: Path) -> None:
    before, new = vocabulary("one", "item"), spec("day2.parquet")
    assert not up_to_date(new, Path("one"), parent=read_parent(new, Path("one"), refit_numbers=False))
    extend("one", "one", new)
    assert up_to_date(new, Path("one"), parent=read_parent(new, Path("one"), refit_numbers=False))
    assert not up_to_date(new, Path("one"), parent=read_parent(new, Path("one"), refit_numbers=True))
    assert vocabulary("one", "item")["value"][: len(before["value"])] == before["value"]
    assert json.loads(Path("one/manifest.json").read_text())["extended"]["tables"]["item"] == {"from": 3, "to": 6}


def log(day: int, file: str) -> None:
    """Events of a day with an item of its own, a later time a row."""
    rng = np.random.default_rng(day)
    items = [f"i{at}" for at in rng.integers(0, 12, 80)] + [f"new{day}"] * 4
    columns = {"item": items, "user": [f"u{at}" for at in rng.integers(0, 9, 84)], "click": rng.integers(0, 2, 84)}
    pq.write_table(pa.table(columns | {"time": 100 * day + rng.permutation(84)}), file)


def of_log(file: str, **split: Any) -> FeatureSpec:
    data = {"format": "parquet", "train": [file], "negatives": {"item": "item", "user": "user", "positive": "click"}}
    data["split"] = {"by": "time", "column": "time", "valid_fraction": 0.2, "test_fraction": 0.1} | split
    features = [{"type": "categorical", "name": "item", "min_count": 2}, {"type": "categorical", "name": "user"}]
    raw = {
        "data": data,
        "tasks": [{"name": "click"}],
        "features": [*features, {"type": "count", "name": "n", "by": ["item"]}],
    }
    return parse(raw, place="x.toml", into=FeatureSpec)


def test_days_with_negatives_and_a_split_by_time(folder: Path) -> None:
    """A day's own splits and draws, on the tables of both days: counts are those of each day alone, added up."""
    for day in (1, 2):
        log(day, f"log{day}.parquet")
        run(of_log(f"log{day}.parquet"), Path(f"alone{day}"), report=silent)
    second = of_log("log2.parquet")
    manifest = extend("alone1", "two", second)
    days = [
        {value: count for part in ("transform/vocabulary", "counts") for value, count in counted(f"alone{day}/{part}")}
        for day in (1, 2)
    ]
    total = Counter(days[0]) + Counter(days[1])
    one, two = vocabulary("alone1", "item"), vocabulary("two", "item")
    assert two["value"][: len(one["value"])] == one["value"] and "new2" not in one["value"]
    assert dict(zip(two["value"], two["count"], strict=True)) == {value: n for value, n in total.items() if n > 1}
    assert sum(total.values()) == sum(splits["train"]["rows"] for splits in (manifest["splits"], made("alone1")))
    alone = vocabulary("alone2", "item")
    for split in ("train", "valid", "test"):
        rows = {name: pq.read_table(f"{name}/{split}") for name in ("two", "alone2")}
        assert rows["two"]["click"] == rows["alone2"]["click"] and rows["two"].num_rows
        values = {name: [None, *vocabulary(name, "item")["value"]] for name in rows}
        for new, old in zip(rows["two"]["item"].to_pylist(), rows["alone2"]["item"].to_pylist(), strict=True):
            assert old == 0 or values["two"][new] == values["alone2"][old]
        assert manifest["splits"][split]["label_rate"] == made("alone2")[split]["label_rate"]
    assert set(alone["value"]) <= set(two["value"])
    extend("two", "again", second)
    assert fitted("again") == fitted("two")
    with pytest.raises(Fault, match="whose rows it has counted, but not in this company or with this"):
        read_parent(of_log("log2.parquet", valid_fraction=0.3), Path("two"), refit_numbers=False)


def counted(folder: str) -> list[tuple[str, int]]:
    table = pq.read_table(f"{folder}/item.parquet")
    return list(zip(table["value"].to_pylist(), table["count"].to_pylist(), strict=True))


def made(folder: str) -> dict[str, Any]:
    splits: dict[str, Any] = json.loads(Path(folder, "manifest.json").read_text())["splits"]
    return splits


@pytest.mark.parametrize("train", [["day1.parquet", "day2.parquet"], ["day1.parquet"]])
def test_rows_do_not_count_twice(folder: Path, train: list[str]) -> None:
    new = spec(*train)
    if len(train) == 1:
        new = new.model_copy(update={"data": new.data.model_copy(update={"valid": []})})
    with pytest.raises(Fault, match=r"data.train, to extend one: got day1.parquet, whose rows it has counted"):
        read_parent(new, Path("one"), refit_numbers=False)


def test_a_file_is_known_by_its_bytes(folder: Path) -> None:
    """Neither a new time of change nor another name makes rows count twice; files without rows never did count."""
    os.utime("day1.parquet", (1, 1))
    parent = read_parent(spec("day1.parquet"), Path("one"), refit_numbers=False)
    assert parent and not parent.new_rows
    Path("copy.parquet").write_bytes(Path("day1.parquet").read_bytes())
    with pytest.raises(Fault, match=r"got copy.parquet, whose rows it has counted"):
        read_parent(spec("copy.parquet", "day2.parquet"), Path("one"), refit_numbers=False)
    pq.write_table(pa.table(DAY1).slice(0, 0), "day0.parquet")
    run(spec("day0.parquet", "day1.parquet"), Path("zero"), report=silent)
    parent = read_parent(spec("day0.parquet", "day2.parquet"), Path("zero"), refit_numbers=False)
    assert parent and parent.new_rows
    assert not up_to_date(spec("day1.parquet"), Path("one")), "a folder is made again where a time has changed"


def test_every_other_setting_of_a_feature_is_named(folder: Path) -> None:
    features = [dict(feature) for feature in SPEC["features"]]
    features[0]["min_count"] = 3
    features[7]["smoothing"] = 9.0
    features[2] = {"type": "categorical", "name": "new"}
    with pytest.raises(Faults) as caught:
        read_parent(spec("day2.parquet", features=features), Path("one"), refit_numbers=False)
    said = str(caught.value)
    assert "features.item.min_count: got 3; wanted 2 of one/manifest.json" in said
    assert "features.item_rate.smoothing: got 9.0; wanted 1.0" in said
    assert "features.new.type: got 'categorical'; wanted nothing" in said and "features.page.type: got nothing" in said
    with pytest.raises(Faults, match=r"features: got item_count, .*wanted the order item, user"):
        read_parent(spec("day2.parquet", features=SPEC["features"][::-1]), Path("one"), refit_numbers=False)
    with pytest.raises(Faults, match=r"tasks\.click\.column"):
        read_parent(spec("day2.parquet", tasks=[{"name": "click", "column": "link"}]), Path("one"), refit_numbers=False)
    heavier = spec("day2.parquet", tasks=[{"name": "click", "weight": 2.0}])
    assert read_parent(heavier, Path("one"), refit_numbers=False)


def test_the_command_says_what_came_and_repeats_nothing(folder: Path) -> None:
    lines = ["name = 'x'", "[data]", "format = 'parquet'", "train = ['day1.parquet']", "test = ['test.parquet']"]
    lines += ["valid = ['test.parquet']", "[[tasks]]", "name = 'click'"]
    lines += ["[[features]]", "type = 'categorical'", "name = 'item'"]
    Path("x.toml").write_text("\n".join(lines))

    def etl(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["run", "x.toml", *arguments])
        return result.exit_code, result.output.lstrip()

    assert etl("--out", "d1")[0] == 0
    day2 = ("--extend", "d1", "--out", "d2", "--set", "data.train=['day2.parquet']")
    assert etl(*day2) == (0, "d2: train 8, valid 8, test 8 rows\nitem: 3 rows added, 8 in all\n")
    assert etl(*day2) == (0, "d2: up to date\n")
    code, said = etl("--out", "d2", "--set", "data.train=['day2.parquet']")
    assert (code, said) == (0, "d2: train 8, valid 8, test 8 rows\n"), "a plain run fits anew"
    assert etl("--refit-numbers")[0] == 2
    code, said = etl("--extend", "nowhere")
    assert code == 2 and "nowhere/manifest.json: got no such file" in said and "Traceback" not in said
    manifest = json.loads(Path("d1/manifest.json").read_text())
    file, content = manifest["counted"][0]["files"][0]
    without = {key: manifest[key] for key in manifest if key != "counted"}
    for older in ({}, {"counted": [manifest["counted"][0] | {"files": [[file, sha256(Path(file))]]}]}):
        Path("d1/manifest.json").write_text(json.dumps(without | older))
        code, said = etl(*day2)
        assert code == 2 and "an older version made it" in said
    assert content.startswith("xxh3:")


def test_a_fault_on_the_way_leaves_both_folders(folder: Path) -> None:
    bad = pa.table(DAY2 | {"click": [7.0] * 8})
    pq.write_table(bad, "day2.parquet")
    before = {path: path.read_bytes() for path in Path("one").rglob("*") if path.is_file()}
    with pytest.raises(Fault, match="wanted 0 or 1"):
        extend("one", "one", spec("day2.parquet"))
    assert {path: path.read_bytes() for path in Path("one").rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in Path().iterdir() if path.is_dir()) == ["one"]


def test_up_to_date_follows_the_parent(folder: Path) -> None:
    new = spec("day2.parquet")
    extend("one", "two", new)
    parent = read_parent(new, Path("one"), refit_numbers=False)
    assert up_to_date(new, Path("two"), parent=parent) and not up_to_date(new, Path("two"))
    assert not up_to_date(new, Path("two"), parent=read_parent(new, Path("one"), refit_numbers=True))
    run(spec("day1.parquet", etl={"rows_per_shard": 3}), Path("one"), report=silent)
    assert not up_to_date(new, Path("two"), parent=read_parent(new, Path("one"), refit_numbers=False))


values = st.lists(st.sampled_from(["", "a", "b", "ç", "d", "e", "f", "😀"]), max_size=30)


@given(
    days=st.lists(values, min_size=1, max_size=4), min_count=st.integers(1, 4), max_rows=st.none() | st.integers(2, 6)
)
def test_growing_by_days_is_a_law(days: list[list[str]], min_count: int, max_rows: int | None) -> None:
    rules = Categorical.model_validate({"type": "categorical", "min_count": min_count, "max_rows": max_rows})
    vocabulary = rejected = pl.DataFrame(schema={"value": pl.String, "count": pl.Int64})
    total: Counter[str] = Counter()
    known: list[str] = []
    for day in days:
        total.update(day)
        today = Counter(day)
        counts = pl.DataFrame(
            {"value": list(today), "count": list(today.values())}, schema={"value": pl.String, "count": pl.UInt32}
        )
        vocabulary, rejected = grown(counts, old=vocabulary, rejected=rejected, rules=rules)
        new = sorted((value for value in total if value not in known), key=lambda value: (-total[value], value))
        room = len(new) if max_rows is None else max_rows - 1 - len(known)
        known += [value for value in new if total[value] >= min_count][:room]
        assert vocabulary["value"].to_list() == known
        assert vocabulary["count"].to_list() == [total[value] for value in known]
        assert dict(rejected.iter_rows()) == {value: total[value] for value in total if value not in known}


@settings(max_examples=12, deadline=None)
@given(days=st.lists(st.lists(st.none() | st.integers(-(2**63) + 2, 2**63 - 1), max_size=12), min_size=2, max_size=2))
def test_ids_of_two_random_days(days: list[list[int | None]], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("days")
    for at, day in enumerate(days):
        columns = {"user": pa.array([*day, None, None], pa.int64()), "click": [0.0] * len(day) + [0.0, 1.0]}
        pq.write_table(pa.table(columns), folder / f"{at}.parquet")

    def of_day(at: int) -> FeatureSpec:
        files = {name: [str(folder / f"{at}.parquet")] for name in ("train", "valid", "test")}
        features = [{"type": "categorical", "name": "user", "dtype": "int64"}]
        raw = {"data": {"format": "parquet"} | files, "tasks": [{"name": "click"}], "features": features}
        return parse(raw, place="x", into=FeatureSpec)

    run(of_day(0), folder / "one", report=silent)
    extend(str(folder / "one"), str(folder / "two"), of_day(1))
    old, new = (vocabulary(str(folder / name), "user") for name in ("one", "two"))
    assert new["value"][: len(old["value"])] == old["value"] and new["row"] == list(range(1, len(new["row"]) + 1))
    counts = Counter(value for value in days[1] if value is not None and value not in old["value"])
    assert new["value"][len(old["value"]) :] == sorted(counts, key=lambda value: (-counts[value], value))
    ids = pq.read_table(folder / "two/train")["user"].to_pylist()
    assert ids == [0 if value is None else new["value"].index(value) + 1 for value in [*days[1], None, None]]
    rows = json.loads((folder / "two/schema.json").read_text())["tables"][0]["rows"]
    assert max(ids) < rows == len(new["value"]) + 1
