"""What NVTabular 23.8 does wrong by itself, each shown on NVTabular as its users write it, and what the engine makes.

The traps are numbered as in docs/etl.md. One dataset folder serves them all: 60 training rows in three partitions.
"""

import json
import math
import statistics
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from etl.experiment_file import parse
from etl.faults import Fault
from etl.run import run
from etl.spec import FeatureSpec

if find_spec("nvtabular") is None:
    pytest.skip("the extra 'nvtabular' is not installed", allow_module_level=True)

from etl.engines.nvtabular.library import Dataset, Workflow, ddf, quiet

with quiet():
    import pandas as pd
    from nvtabular import ops

ROWS, GROUP = 60, 20
BIG = 2**63 - 1
rng = np.random.default_rng(0)
TEXTS = [f"v{at:02d}" for at in rng.permutation(ROWS)]
EPOCH = (1.7e9 + 10 * rng.standard_normal(ROWS)).tolist()
FLOATS = (1000 + rng.standard_normal(ROWS)).astype(np.float32)
SKEWED = [None if at % 7 == 3 else float(at * at) for at in range(ROWS)]

TRAIN: dict[str, Any] = {
    "big": pa.array([None if at % 5 == 0 else BIG - at % 3 for at in range(ROWS)]),
    "late": pa.array([at % 4 for at in range(ROWS)]),
    "narrow": pa.array([at % 3 for at in range(ROWS)], pa.int32()),
    "dark": pa.array([None if GROUP <= at < 2 * GROUP else "abc"[at % 3] for at in range(ROWS)]),
    "bare": pa.array([[] if GROUP <= at < 2 * GROUP else ["a", None, "b"] for at in range(ROWS)]),
    "ties": pa.array(TEXTS),
    "same": pa.array(["x"] * 6 + ["y"] * (ROWS - 6)),
    "twin": pa.array(["x"] * 6 + ["y"] * (ROWS - 6)),
    "clock": pa.array(EPOCH),
    "float": pa.array(FLOATS),
    "skewed": pa.array(SKEWED, pa.float64()),
    "path": pa.array([[1, 2, 3][: at % 4] for at in range(ROWS)], pa.list_(pa.int64())),
    "click": pa.array([at % 2 for at in range(ROWS)]),
}
TEST = TRAIN | {
    "late": pa.array([None if at == 1 else at % 4 for at in range(ROWS)], pa.int64()),
    "narrow": pa.array([2**32 + 1] * ROWS, pa.int64()),
    "same": pa.array(["new"] * 6 + ["y"] * (ROWS - 6)),
}
FEATURES: list[dict[str, Any]] = [
    {"type": "categorical", "columns": ["big", "late", "narrow"], "dtype": "int64"},
    {"type": "categorical", "columns": ["dark", "ties"]},
    {"type": "categorical", "name": "cut", "column": "ties", "max_rows": 11},
    {"type": "bag", "name": "bare", "max_length": 3},
    {"type": "categorical", "name": "hashed", "column": "same", "hash_rows": 1000},
    {"type": "categorical", "name": "same"},
    {"type": "categorical", "name": "twin"},
    {"type": "cross", "name": "pair", "inputs": ["same", "twin"], "hash_rows": 1000},
    {"type": "numeric", "columns": ["clock", "float"]},
    {"type": "numeric", "name": "log_clock", "column": "clock", "log1p": True, "scale": "minmax"},
    {"type": "numeric", "name": "middle", "column": "skewed", "fill": "median", "scale": "none"},
    {"type": "numeric", "name": "other", "column": "skewed", "fill": -1.0, "scale": "none"},
    {"type": "numeric", "name": "bucket", "column": "skewed", "as": "buckets", "boundaries": [100.0, 900.0]},
    {"type": "sequence", "name": "path", "dtype": "int64", "max_length": 2},
    {"type": "target", "name": "rate", "by": ["dark"], "folds": 3},
    {"type": "count", "name": "times", "by": ["dark"], "log1p": False},
]


def spec_of(features: list[dict[str, Any]], folder: Path, **sections: Any) -> FeatureSpec:
    files = {s: [str(folder / f"{s}.parquet")] for s in ("train", "valid", "test")}
    raw = {
        "data": {"format": "parquet"} | files,
        "tasks": [{"name": "click"}],
        "features": features,
        "etl": {"engine": "nvtabular", "rows_per_group": GROUP},
    }
    return parse(raw | sections, place="traps", into=FeatureSpec)


def write(folder: Path, train: dict[str, Any], test: dict[str, Any]) -> None:
    for split, columns in (("train", train), ("valid", test), ("test", test)):
        pq.write_table(pa.table(columns), folder / f"{split}.parquet", row_group_size=GROUP)


def make(features: list[dict[str, Any]], folder: Path, **sections: Any) -> Path:
    run(spec_of(features, folder, **sections), folder / "data", report=lambda stage, rows, total=None: None)
    return folder / "data"


class Made:
    """The engine's folder."""

    def __init__(self, folder: Path) -> None:
        self.train, self.test = (pq.read_table(folder / split).to_pydict() for split in ("train", "test"))
        self.splits = json.loads((folder / "manifest.json").read_text())["splits"]
        self.steps = json.loads((folder / "transform/transform.json").read_text())
        self.vocabularies = folder / "transform/vocabulary"

    def row(self, table: str, value: Any) -> int:
        found = pq.read_table(self.vocabularies / f"{table}.parquet").to_pydict()
        return found["row"][found["value"].index(value)] if value in found["value"] else 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("traps")
    write(folder, TRAIN, TEST)
    return Made(make(FEATURES, folder))


@pytest.fixture(autouse=True)
def chatter() -> Iterator[None]:
    """NVTabular's own warnings, which the engine keeps to itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def column(name: str) -> pd.DataFrame:
    """A training column as NVTabular's users have it."""
    return pa.table({name: TRAIN[name]}).to_pandas()


def naive(graph: Any, rows: pd.DataFrame, *, then: pd.DataFrame | None = None, parts: int = 1) -> pd.DataFrame:
    """Fits and transforms; with `then`, transforms other rows."""
    workflow = Workflow(graph)
    fitted = Dataset(ddf.from_pandas(rows, npartitions=parts, sort=False), cpu=True)
    workflow.fit(fitted)
    return workflow.transform(then) if then is not None else workflow.transform(fitted).to_ddf().compute()


def test_1_the_hash_takes_the_row_s_label(made: Made) -> None:
    assert len(set(naive(["same"] >> ops.HashBucket(1000), column("same"))["same"][:6])) > 1
    assert len(set(made.train["hashed"][:6])) == 1


def test_2_a_cross_of_equal_values_is_always_bucket_0(made: Made) -> None:
    rows = pd.concat([column("same"), column("twin")], axis=1)
    assert set(naive(["same", "twin"] >> ops.HashedCross(1000), rows)["same_X_twin"]) == {0}
    assert len(set(made.train["pair"])) == 2


def test_3_equal_unseen_values_fall_into_different_buckets(made: Made, tmp_path: Path) -> None:
    unseen = pd.DataFrame({"same": ["new"] * 6})
    op = ops.Categorify(num_buckets={"same": 50}, max_size={"same": 60}, out_path=str(tmp_path))
    assert len(set(naive(["same"] >> op, column("same"), then=unseen)["same"])) > 1
    assert made.test["same"] == [0] * 6 + [made.row("same", "y")] * (ROWS - 6)
    assert made.splits["test"]["features"]["same"] == {"missing": 0, "unseen": 6}
    hashed = made.test["hashed"]
    assert len(set(hashed[:6])) == 1 and hashed[0] > 0 and hashed[6:] == made.train["hashed"][6:]


def test_4_ids_beside_nulls_pass_through_float64(made: Made, tmp_path: Path) -> None:
    codes = naive(["big"] >> ops.Categorify(out_path=str(tmp_path)), column("big"))["big"]
    assert len(set(codes[codes > 1])) == 1, "three ids, one code"
    assert len(set(made.train["big"]) - {0}) == 3 and made.splits["train"]["features"]["big"]["missing"] == 12
    assert [made.row("big", BIG - at % 3) for at in range(1, 5)] == made.train["big"][1:5]


def test_5_nulls_are_marked_at_the_rows_of_their_labels(tmp_path: Path) -> None:
    rows = pd.DataFrame({"dark": ["a", "b", None, "a"]}, index=[3, 2, 1, 0])
    codes = naive(["dark"] >> ops.Categorify(out_path=str(tmp_path)), rows, then=rows)["dark"].tolist()
    assert codes.index(1) != 2 and codes[2] != 1
    frame = pa.table({name: TRAIN[name] for name in ("dark", "click")}).to_pandas().sample(frac=1, random_state=1)
    shuffled = pa.Table.from_pandas(frame)
    assert "__index_level_0__" in shuffled.column_names, "the labels of the rows are in the file"
    for split in ("train", "valid", "test"):
        pq.write_table(shuffled, tmp_path / f"{split}.parquet", row_group_size=GROUP)
    found = Made(make([{"type": "categorical", "name": "dark"}], tmp_path))
    for rows_of in (found.train, found.test):
        assert rows_of["dark"] == [found.row("dark", value) if value else 0 for value in shuffled["dark"].to_pylist()]


def test_6_other_whole_numbers_wrap_into_the_fitted_type(made: Made, tmp_path: Path) -> None:
    codes = naive(["narrow"] >> ops.Categorify(out_path=str(tmp_path)), column("narrow"),
                  then=pd.DataFrame({"narrow": np.array([2**32 + 1, 1])}))["narrow"].tolist()  # fmt: skip
    assert codes[0] == codes[1], "2 ** 32 + 1 is taken for 1"
    assert set(made.test["narrow"]) == {0} and made.splits["test"]["features"]["narrow"]["unseen"] == ROWS


def test_7_fractions_are_cut_to_ids(tmp_path: Path) -> None:
    op = ops.Categorify(out_path=str(tmp_path / "c"))
    codes = naive(["late"] >> op, column("late"), then=pd.DataFrame({"late": [2.7, 2.0]}))["late"].tolist()
    assert codes[0] == codes[1]
    write(tmp_path, TRAIN, TEST | {"late": pa.array([2.7] * ROWS)})
    with pytest.raises(Fault, match="holds double, wanted int64"):
        make([{"type": "categorical", "name": "late", "dtype": "int64"}], tmp_path)


def test_8_a_null_within_a_list_counts_as_unseen(made: Made, tmp_path: Path) -> None:
    rows = pd.DataFrame({"bare": [["a", None, "b"], ["a"]]})
    assert naive(["bare"] >> ops.Categorify(out_path=str(tmp_path)), rows)["bare"][0][1] == 2, "1 is null"
    assert made.train["bare"][0][1] == 0
    assert made.splits["train"]["features"]["bare"] == {"missing": 2 * GROUP, "unseen": 0}


def test_9_a_second_workflow_writes_over_the_first_one_s_vocabulary(tmp_path: Path, made: Made) -> None:
    first = Workflow(["same"] >> ops.Categorify(out_path=str(tmp_path)))
    first.fit(Dataset(column("same"), cpu=True))
    before = first.transform(column("same"))["same"].tolist()
    other = pd.DataFrame({"same": ["z", "z", "x", "y", "y", "y"]})
    Workflow(["same"] >> ops.Categorify(out_path=str(tmp_path))).fit(Dataset(other, cpu=True))
    from merlin.io.worker import clean_worker_cache

    clean_worker_cache()
    assert first.transform(column("same"))["same"].tolist() != before
    tables = [pq.read_table(made.vocabularies / f"{name}.parquet")["value"].to_pylist() for name in ("ties", "cut")]
    assert len(tables[0]) == ROWS and tables[1] == tables[0][:10]


def test_10_target_encoding_depends_on_the_partitions(made: Made, tmp_path: Path) -> None:
    rows = pd.DataFrame({"g": ["a", "b", "c"] * 40, "click": ([1, 0, 0, 1, 1] * 24)})

    def encoded(parts: int) -> list[float]:
        op = ops.TargetEncoding("click", kfold=3, p_smooth=1, out_path=str(tmp_path / str(parts)))
        return naive(["g"] >> op, rows, parts=parts)["TE_g_click"].tolist()

    assert encoded(1) != encoded(3)
    write(tmp_path, TRAIN, TEST)
    other = Made(make(FEATURES, tmp_path, etl={"engine": "nvtabular", "rows_per_group": 7}))
    assert made.train["rate"] == other.train["rate"]
    values = zip(TEST["dark"].to_pylist(), made.test["rate"], strict=True)
    assert len(set(values)) == 4, "three values and none, a number each"


def test_11_joined_statistics_of_no_group_are_infinite_or_no_number(made: Made, tmp_path: Path) -> None:
    rows = pd.DataFrame({"g": ["a", None, None, "a"], "x": [1.0, 2.0, 3.0, 4.0]})
    op = ops.JoinGroupby(cont_cols=["x"], stats=["count", "mean"], out_path=str(tmp_path / "j"))
    assert not np.isfinite(naive(["g"] >> op, rows)["g_x_mean"][1:3]).any()
    dark = TRAIN["dark"].to_pylist()
    assert made.train["times"] == [float(dark.count(value)) if value else 0.0 for value in dark]
    assert made.test["rate"][GROUP : 2 * GROUP] == [0.5] * GROUP, "the rate of all rows"


def test_12_epoch_seconds_lose_their_deviation(made: Made) -> None:
    scaled = naive(["clock"] >> ops.Normalize(), column("clock"))["clock"]
    mean, std = statistics.fmean(EPOCH), statistics.pstdev(EPOCH)
    exact = [(x - mean) / std for x in EPOCH]
    assert max(abs(scaled - exact)) > 0.1
    np.testing.assert_allclose(made.train["clock"], exact, atol=1e-6)


def test_13_float32_numbers_are_squared_in_their_own_type_or_divided_by_a_sample_s_deviation(made: Made) -> None:
    exact = (FLOATS.astype(np.float64) - FLOATS.astype(np.float64).mean()) / FLOATS.astype(np.float64).std()
    assert np.abs(naive(["float"] >> ops.Normalize(), column("float"))["float"] - exact).max() > 1e-3
    np.testing.assert_allclose(made.train["float"], exact, atol=1e-6)


def test_14_a_median_depends_on_the_partitions(made: Made) -> None:
    rows = column("skewed")
    found = {parts: naive(["skewed"] >> ops.FillMedian(), rows, parts=parts)["skewed"].iloc[3] for parts in (1, 4)}
    exact = statistics.median([x for x in SKEWED if x is not None])
    assert found[4] != exact
    assert made.train["middle"][3] == pytest.approx(exact)


def test_15_a_missing_number_lands_in_the_top_bucket(made: Made) -> None:
    assert naive(["skewed"] >> ops.Bucketize({"skewed": [100.0, 900.0]}), column("skewed"))["skewed"].iloc[3] == 2
    assert made.train["bucket"][3] == 0 and made.train["bucket"][:3] == [1, 1, 1] and made.train["bucket"][-2] == 3


def test_16_the_logarithm_is_taken_in_float32(made: Made) -> None:
    assert len(set(naive(["clock"] >> ops.LogOp(), column("clock"))["clock"])) == 1
    logs = [math.log1p(x) for x in EPOCH]
    exact = [(x - min(logs)) / (max(logs) - min(logs)) for x in logs]
    np.testing.assert_allclose(made.train["log_clock"], exact, atol=1e-6)


MANY = [f"v{at:04}" for at in range(2000)]
TWICE, ONCE = MANY[::3], [text for at, text in enumerate(MANY) if at % 3]
TIED = pd.DataFrame({"ties": [*MANY, *TWICE]})
"""Of two counts, and many: numpy's sort for AVX-512 leaves few or all equal ones as they are."""


def test_17_ties_are_in_no_order(made: Made, tmp_path: Path) -> None:
    naive(["ties"] >> ops.Categorify(out_path=str(tmp_path)), TIED)
    assert pq.read_table(tmp_path / "categories/unique.ties.parquet")["ties"].to_pylist() != [*TWICE, *ONCE]
    assert pq.read_table(made.vocabularies / "ties.parquet")["value"].to_pylist() == sorted(TEXTS)


def test_18_max_size_keeps_any_of_the_values_that_tie(made: Made, tmp_path: Path) -> None:
    naive(["ties"] >> ops.Categorify(max_size=13, out_path=str(tmp_path)), TIED)
    assert pq.read_table(tmp_path / "categories/unique.ties.parquet")["ties"].to_pylist() != TWICE[:10]
    assert pq.read_table(made.vocabularies / "cut.parquet")["value"].to_pylist() == sorted(TEXTS)[:10]
    assert [row > 0 for row in made.train["cut"]] == [text < "v10" for text in TEXTS]


def test_19_padding_leaves_lists_as_they_are(made: Made) -> None:
    rows = pd.DataFrame({"path": [np.array([1, 2, 3]), np.array([1])]})
    assert [len(x) for x in naive(["path"] >> ops.ListSlice(2, pad=True), rows)["path"]] != [2, 2]
    one, two, three = (made.row("path", value) for value in (1, 2, 3))
    assert made.train["path"][:4] == [[], [one], [one, two], [two, three]], "the newest two"


def test_20_a_filter_moves_rows_apart(made: Made, tmp_path: Path) -> None:
    rows = pd.DataFrame({"x": [1.0, None, 3.0], "y": [10.0, 20.0, 30.0]})
    found = naive((["x"] >> ops.Dropna()) + ["y"], rows)
    assert [30.0, 3.0] not in found[["y", "x"]].to_numpy().tolist()
    wanted = [(made.row("late", at % 4), -1.0 if x is None else np.float32(x)) for at, x in enumerate(SKEWED)]
    assert list(zip(made.train["late"], made.train["other"], strict=True)) == wanted, "rows without a number stay"
    assert made.test["other"] == made.train["other"] and made.splits["test"]["rows"] == ROWS


def test_21_a_partition_without_values_ends_the_job(made: Made, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="dark"):
        naive(["dark"] >> ops.Categorify(out_path=str(tmp_path)), column("dark"), parts=3)
    wanted = Counter("abc"[at % 3] for at in range(ROWS) if not GROUP <= at < 2 * GROUP)
    assert made.train["dark"] == [made.row("dark", value) if value else 0 for value in TRAIN["dark"].to_pylist()]
    assert made.splits["train"]["features"]["dark"]["missing"] == GROUP == ROWS - wanted.total()


def test_22_a_partition_of_empty_lists_ends_the_job(made: Made, tmp_path: Path) -> None:
    rows = pd.DataFrame({"bare": [["a"], ["b"], [], []]})
    with pytest.raises(Exception, match=r".+"):
        naive(["bare"] >> ops.Categorify(out_path=str(tmp_path)), rows, parts=2)
    assert made.train["bare"][GROUP : 2 * GROUP] == [[]] * GROUP


def test_23_a_null_where_the_fit_had_none_ends_the_job(made: Made, tmp_path: Path) -> None:
    rows = pd.DataFrame({"late": [0, None, 2]})
    with pytest.raises(Exception, match="late"):
        naive(["late"] >> ops.Categorify(out_path=str(tmp_path)), column("late"), then=rows)
    assert made.test["late"][1] == 0 and made.splits["test"]["features"]["late"] == {"missing": 1, "unseen": 0}


def test_24_texts_where_the_fit_had_numbers_are_unseen_without_a_word(tmp_path: Path) -> None:
    op = ops.Categorify(out_path=str(tmp_path / "c"))
    rows = pd.DataFrame({"same": ["1", "2"]})
    assert naive(["same"] >> op, rows, then=pd.DataFrame({"same": [1.0, 2.0]}))["same"].tolist() == [2, 2]
    write(tmp_path, TRAIN, TEST | {"same": pa.array([1] * ROWS)})
    with pytest.raises(Fault, match="holds int64, wanted string"):
        make([{"type": "categorical", "name": "same"}], tmp_path)


def test_25_the_columns_of_a_table_name_its_file(tmp_path: Path) -> None:
    names = [f"column_with_a_name_{at:03d}" for at in range(70)]
    rows = pd.DataFrame({name: ["a", "b"] for name in names})
    with pytest.raises(OSError, match="too long"):
        naive([names] >> ops.Categorify(out_path=str(tmp_path / "c")), rows)
    columns = {name: pa.array(["a", "b"] * 30) for name in names} | {"click": TRAIN["click"]}
    write(tmp_path, columns, columns)
    features = [{"type": "categorical", "name": name, "table": "t"} for name in names]
    with pytest.raises(Fault, match="table 't': got 70 columns on one table with engine 'nvtabular'"):
        make(features, tmp_path)


def test_26_rows_in_groups_come_once_a_partition(tmp_path: Path) -> None:
    rows = pd.DataFrame({"user": ["u", "v"] * 10, "item": range(20)})
    found = naive(["user", "item"] >> ops.Groupby(groupby_cols=["user"], aggs={"item": ["list"]}), rows, parts=2)
    assert len(found) == 4, "two users"
    users = [None if at % 11 == 10 else "uv"[at % 2] for at in range(ROWS)]
    log = {"user": pa.array(users), "item": pa.array([at % 7 for at in range(ROWS)]), "click": TRAIN["click"]}
    log["time"] = pa.array([at // 4 for at in range(ROWS)])
    write(tmp_path, log, log | {"time": pa.array([100 + at // 4 for at in range(ROWS)])})
    history = {"user": "user", "time": "time", "columns": {"past": "item"}, "max_length": 3}
    data = {"format": "parquet", "histories": [history]}
    data |= {split: [str(tmp_path / f"{split}.parquet")] for split in ("train", "valid", "test")}
    past = {"type": "sequence", "name": "past", "dtype": "int64", "max_length": 3}
    got = Made(make([past], tmp_path, data=data))
    for at, user in enumerate(users):
        before = [n % 7 for n in range(at // 4 * 4) if users[n] == user is not None]
        assert got.train["past"][at] == [got.row("past", item) for item in before[-3:]], (
            "each row, in the order of time"
        )
