"""Target and count encodings against plain Python; their leaks; and serving from the folder alone."""

import importlib.util
import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import etl.lookup
import etl.transform
from etl.engines.encodings import fit_encoding, fold
from etl.engines.fitting import Fitting
from etl.experiment_file import parse
from etl.faults import Faults
from etl.folds import fold_of
from etl.pack import pack
from etl.run import run
from etl.spec import FeatureSpec, Target
from etl.transform import mix
from etl.typed import Columns

BIG = 2**62 + 1
TARGET: dict[str, Any] = {
    "type": "target",
    "name": "t",
    "by": ["user", "city"],
    "task": "buy",
    "smoothing": 2.0,
    "folds": 3,
    "seed": 5,
}
SPEC: dict[str, Any] = {
    "data": {"format": "parquet", "train": ["train.parquet"], "valid": ["valid.parquet"], "test": ["test.parquet"]},
    "tasks": [{"name": "click"}, {"name": "buy", "given": "click"}],
    "features": [
        {"type": "categorical", "name": "user", "dtype": "int64"},
        TARGET,
        {"type": "target", "name": "u", "by": ["user"], "task": "click", "folds": 4},
        {"type": "count", "name": "n", "by": ["city"], "log1p": False},
        {"type": "count", "name": "ln", "by": ["city", "user"]},
    ],
}
Row = tuple[int | None, str | None, int, int]
rows_of_data = st.lists(
    st.tuples(
        st.sampled_from([None, BIG, BIG + 1, -7]), st.sampled_from([None, "", "é", "b"]), st.booleans(), st.booleans()
    ),
    min_size=1,
    max_size=40,
)
BOTH_CLASSES = [(None, None, 0, 0), (None, None, 1, 0), (None, None, 1, 1)]


def write(rows: Sequence[Row], path: Path) -> None:
    user, city, click, buy = zip(*rows, strict=True)
    columns = {"user": pa.array(user, pa.int64()), "city": pa.array(city, pa.string())}
    pq.write_table(pa.table(columns | {"click": np.array(click, float), "buy": np.array(buy, float)}), path)


def dataset(folder: Path, train: Sequence[Row], other: Sequence[Row], **etl: int) -> dict[str, dict[str, list[Any]]]:
    for name, rows in (("train", train), ("valid", other), ("test", other)):
        write(rows, folder / f"{name}.parquet")
    files = {name: [str(folder / f"{name}.parquet")] for name in ("train", "valid", "test")}
    raw = SPEC | {"data": {"format": "parquet"} | files, "etl": etl}
    run(parse(raw, place="x", into=FeatureSpec), folder / "data", report=silent)
    return {split: pq.read_table(folder / "data" / split).to_pydict() for split in ("train", "test")}


def silent(stage: str, rows: int, *, total: int | None = None) -> None:
    """Nobody watches."""


def textbook_fold(position: int, *, seed: int, folds: int) -> int:
    """splitmix64 twice over the seed, then over the position."""

    def splitmix(z: int) -> int:
        z = (z + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    return splitmix(position ^ splitmix(splitmix(seed))) % folds


def reference(
    row: Row, among: Sequence[Row], *, by: Sequence[int], label: int, given_label: int | None, smoothing: float
) -> float:
    """The smoothed mean label of the other rows with this row's values, the slow way."""
    counted = [other for other in among if given_label is None or other[given_label]]
    rate = sum(other[label] for other in counted) / len(counted) if counted else 0.5
    key = [row[at] for at in by]
    same = [] if None in key else [other[label] for other in counted if [other[at] for at in by] == key]
    return (sum(same) + smoothing * rate) / (len(same) + smoothing)


@given(position=st.integers(0, 2**32 - 2), seed=st.integers(0, 2**63 - 1), folds=st.integers(2, 100))
def test_folds_are_a_textbook_hash_in_numpy_and_in_polars(position: int, seed: int, folds: int) -> None:
    wanted = textbook_fold(position, seed=seed, folds=folds)
    assert fold_of(np.array([position]), seed=seed, folds=folds).tolist() == [wanted]
    frame = pl.DataFrame({"at": [position]}, schema={"at": pl.UInt32})
    assert frame.select(fold(pl.col("at"), seed=seed, folds=folds)).item() == wanted


def test_folds_are_even_and_do_not_follow_the_validation_split() -> None:
    folds = fold_of(np.arange(100_000), seed=0, folds=5)
    assert np.abs(np.bincount(folds) / 100_000 - 0.2).max() < 0.01
    held_out = mix(np.arange(100_000) ^ mix(np.array([0])).view(np.int64)) / 2.0**64 < 0.1
    assert np.abs(np.bincount(folds[held_out]) / held_out.sum() - 0.2).max() < 0.02


@settings(max_examples=25, deadline=None)
@given(train=rows_of_data, other=rows_of_data, groups=st.integers(1, 50))
def test_encodings_equal_plain_python(
    train: list[Row], other: list[Row], groups: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    train = [*train, *BOTH_CLASSES]
    found = dataset(tmp_path_factory.mktemp("t"), train, other, rows_per_group=groups, rows_per_shard=3 * groups)
    t = {"by": [0, 1], "label": 3, "given_label": 2, "smoothing": 2.0}
    u = {"by": [0], "label": 2, "given_label": None, "smoothing": 20.0}
    for name, how, folds, seed in (("t", t, 3, 5), ("u", u, 4, 0)):
        fold_at = [textbook_fold(at, seed=seed, folds=folds) for at in range(len(train))]
        wanted = [
            reference(row, [o for o, f in zip(train, fold_at, strict=True) if f != fold_at[at]], **how)
            for at, row in enumerate(train)
        ]
        np.testing.assert_allclose(found["train"][name], wanted, rtol=1e-6)
        wanted = [reference(row, train, **how) for row in other]
        np.testing.assert_allclose(found["test"][name], wanted, rtol=1e-6)
    for split, rows in (("train", train), ("test", other)):
        counts = [sum(one[1] == row[1] for one in train) if row[1] is not None else 0 for row in rows]
        assert found[split]["n"] == counts
        pairs = [0 if None in row[:2] else sum(one[:2] == row[:2] for one in train) for row in rows]
        np.testing.assert_allclose(found[split]["ln"], [math.log1p(count) for count in pairs], rtol=1e-6)


@settings(max_examples=15, deadline=None)
@given(rows=rows_of_data, at=st.integers(0, 39), click=st.booleans())
def test_a_rows_own_labels_do_not_change_its_own_number(
    rows: list[Row], at: int, click: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    train = [*rows, *BOTH_CLASSES]
    at %= len(rows)
    user, city, *labels = train[at]
    changed = [*train]
    changed[at] = (user, city, *((1 - labels[0], labels[1]) if click else (labels[0], 1 - labels[1])))
    before, after = (dataset(tmp_path_factory.mktemp("own"), each, rows)["train"] for each in (train, changed))
    assert (before["t"][at], before["u"][at]) == (after["t"][at], after["u"][at])
    if click and user is not None:
        assert before["u"] != after["u"] or len(set(fold_of(np.arange(len(train)), seed=0, folds=4).tolist())) == 1


def test_folds_count_positions_in_the_file_where_whole_row_groups_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    click = np.arange(5000) // 500 % 2
    rows = {"user": pa.array(np.arange(5000) % 7), "label:click": click.astype(np.float32)}
    buy = (np.arange(5000) % 3 == 0).astype(np.float32)
    pq.write_table(pa.table(rows | {"label:buy": buy}), tmp_path / "raw/train.parquet", row_group_size=500)
    feature = Target.model_validate({"type": "target", "name": "t", "by": ["user"], "task": "buy"})
    tasks = parse(SPEC, place="x", into=FeatureSpec).tasks
    train = Columns.staged(tmp_path / "raw/train.parquet")
    fit_encoding(feature, tasks, fitting=Fitting(tmp_path, train=train, parent=None))
    found = pq.read_table(tmp_path / "raw/folds/t.parquet").to_pydict()
    folds = fold_of(np.arange(5000), seed=0, folds=5)
    wanted = np.bincount(folds[click == 1], minlength=5)
    assert np.bincount(found["fold"], weights=found["rows"]).tolist() == wanted.tolist()
    assert sum(found["ones"]) == buy[click == 1].sum()


def auc(score: Sequence[float], label: Sequence[float]) -> float:
    order = pl.Series(score).rank().to_numpy()
    ones = np.asarray(label) == 1
    return float((order[ones].sum() - ones.sum() * (ones.sum() + 1) / 2) / (ones.sum() * (~ones).sum()))


def test_random_labels_teach_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)

    def random_rows(count: int) -> list[Row]:
        return [
            (int(u), "b", int(y), 0) for u, y in zip(rng.integers(0, 3000, count), rng.random(count) < 0.5, strict=True)
        ]

    train = [*random_rows(6000), *BOTH_CLASSES]
    found = dataset(tmp_path, train, random_rows(3000))
    assert abs(auc(found["train"]["u"], found["train"]["click"]) - 0.5) < 0.03
    assert abs(auc(found["test"]["u"], found["test"]["click"]) - 0.5) < 0.03
    sums: dict[int | None, list[int]] = {}
    for row in train:
        sums.setdefault(row[0], []).append(row[2])
    naive = [(sum(sums[row[0]]) + 10) / (len(sums[row[0]]) + 20) for row in train]
    assert auc(naive, found["train"]["click"]) > 0.75, "what the folds prevent"


def test_the_fitted_state_is_small_and_the_folds_are_not_in_it(tmp_path: Path) -> None:
    dataset(tmp_path, [(BIG, "b", 1, 1), (BIG, "é", 1, 0), (5, "b", 0, 0), (None, "b", 1, 0)], BOTH_CLASSES)
    table = pq.read_table(tmp_path / "data/transform/encoding/t.parquet").to_pydict()
    assert table["value:user"] == [BIG, BIG] and table["value:city"] == ["b", "é"]
    assert table["rows"] == [1, 1] and table["ones"] == [1, 0]
    state = json.loads((tmp_path / "data/transform/transform.json").read_text())
    step = next(step for step in state["dense"] if step["name"] == "t")
    assert (step["rows"], step["ones"], step["other"]) == (3, 1, 1 / 3), "a row without a value counts for the rate"
    assert table["value"] == [(1 + 2 / 3) / 3, (0 + 2 / 3) / 3]
    assert not list((tmp_path / "data").rglob("*folds*")) and not (tmp_path / "data/raw").exists()


def server_module(folder: Path) -> ModuleType:
    """The transform as the model server loads it: copied files, alone."""
    for module in (etl.lookup, etl.transform):
        path = Path(str(module.__file__))
        shutil.copyfile(path, folder / path.name)
    package = sys.modules["served_transform"] = ModuleType("served_transform")
    package.__path__ = [str(folder)]
    return importlib.import_module("served_transform.transform")


def test_serving_one_row_at_a_time_gives_the_columns_of_the_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    raw: dict[str, pa.Table] = {}
    for split in ("train", "valid", "test"):
        size = 120
        columns = {
            "user": pa.array(
                [None if u < 3 else BIG + int(u) for u in rng.integers(0, 20 + 5 * (split == "test"), size)]
            ),
            "city": pa.array(rng.choice(["", "é", "b", None], size).tolist(), pa.string()),
            "seconds": pa.array([None if x < 0.1 else 1.7e9 + x * 10 for x in rng.random(size)]),
            "tags": pa.array([rng.choice(["x", "y", "zé"], rng.integers(0, 3)).tolist() for _ in range(size)]),
            "click": pa.array((rng.random(size) < 0.5).astype(float)),
            "buy": pa.array((rng.random(size) < 0.5).astype(float)),
        }
        raw[split] = pa.table(columns)
        pq.write_table(raw[split], f"{split}.parquet")
    numeric = [
        {"type": "numeric", "name": f"x{at}", "column": "seconds"} | change
        for at, change in enumerate(
            (
                {},
                {"scale": "minmax", "fill": "median"},
                {"log1p": True, "clip": [1.7e9, 1.7e9 + 9]},
                {"as": "field"},
                {"as": "buckets", "quantiles": 7},
            )
        )
    ]
    features = [*SPEC["features"], *numeric, {"type": "bag", "name": "tags", "max_length": 3}]
    run(parse(SPEC | {"features": features}, place="x", into=FeatureSpec), Path("data"), report=silent)
    etl.lookup.write_slots(Path("data/transform"))
    transform = server_module(tmp_path).Transform.mapped(Path("data/transform"))
    schema = json.loads(Path("data/schema.json").read_text())
    slots = [(f["name"], f["slots"], f["weighted"]) for f in schema["features"]]
    for split in raw:
        stored = pq.read_table(f"data/{split}").to_pydict()
        own = {"t", "u"} if split == "train" else set()
        for at, row in enumerate(raw[split].drop_columns(["click", "buy"]).to_pylist()):
            table = pa.Table.from_pylist([row], schema=raw[split].drop_columns(["click", "buy"]).schema)
            encoded = transform.apply(pack(table, transform.signature))
            ids, floats = encoded.ids[0].tolist(), encoded.floats[0].tolist()
            for name, size, _ in slots:
                mine, ids = ids[:size], ids[size:]
                assert stored[name][at] == (mine[0] if size == 1 else [i for i in mine if i >= 0]), (split, at, name)
            values = [
                *(d["name"] for d in schema["dense"]),
                *(f"{name}:value" for name, _, weighted in slots if weighted),
            ]
            differ = {name for name, value in zip(values, floats, strict=True) if stored[name][at] != value}
            assert differ <= own, (split, at)


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        (TARGET | {"task": "view"}, "target 't': task must be one of click, buy"),
        ({key: value for key, value in TARGET.items() if key != "task"}, "task must be one of click, buy"),
        (TARGET | {"by": ["user", "user"]}, "names a column twice"),
        (TARGET | {"by": []}, "at least 1 item"),
        (TARGET | {"by": ["click"]}, "reads the column 'click', which is a label"),
        (TARGET | {"folds": 1}, "greater than or equal to 2"),
        (TARGET | {"smoothing": -1.0}, "greater than or equal to 0"),
        ({"type": "count", "name": "user", "by": ["city"]}, "named twice: user"),
        ({"type": "count", "name": "c", "by": ["tags"]}, "read as list<string> and as string"),
    ],
)
def test_encodings_that_make_no_sense(feature: dict[str, Any], message: str) -> None:
    features = [SPEC["features"][0], {"type": "bag", "name": "tags", "max_length": 2}, feature]
    with pytest.raises(Faults, match=message):
        parse(SPEC | {"features": features}, place="x", into=FeatureSpec)


def test_a_column_is_read_as_other_features_read_it() -> None:
    spec = parse(SPEC, place="x", into=FeatureSpec)
    assert spec.raw_columns() == {"user": "int64", "city": "string"}
    one = SPEC | {"tasks": [{"name": "click"}], "features": [{"type": "target", "name": "r", "by": ["c"]}]}
    assert [f.task for f in parse(one, place="x", into=FeatureSpec).encodings()] == ["click"]
