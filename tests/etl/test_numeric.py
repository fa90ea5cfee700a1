"""Fill, scale and buckets of numbers, and ranges of columns, against plain Python."""

import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etl.engines.numbers import fit_boundaries, fit_scale
from etl.engines.order import order_statistics
from etl.experiment_file import parse
from etl.faults import Fault, Faults
from etl.run import run
from etl.section import expanded
from etl.spec import FeatureSpec, Numeric, resolve
from etl.transform import MISSING_KEY, MISSING_NUMBER, bucket_keys, scale
from etl.typed import Columns

finite = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, -0.0, 5e-324, 1.0, 1e300])
columns = st.lists(st.none() | st.floats(-1e6, 1e6) | st.sampled_from([0.0, 7.0, math.nan]), min_size=1, max_size=60)


def feature(**settings: Any) -> Numeric:
    return Numeric.model_validate({"type": "numeric", "name": "x", "column": "x"} | settings)


def staged(folder: Path, values: list[float | None], *, group: int = 1 << 20) -> Columns:
    pq.write_table(pa.table({"x": pa.array(values, pa.float64())}), folder / "train.parquet", row_group_size=group)
    return Columns.staged(folder / "train.parquet")


def present(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None and not math.isnan(value)]


@given(numbers=st.lists(finite, min_size=1, max_size=80), in_memory=st.integers(1, 90), data=st.data())
def test_order_statistics_are_those_of_the_sorted_numbers(
    numbers: list[float], in_memory: int, data: st.DataObject
) -> None:
    ranks = data.draw(st.lists(st.integers(0, len(numbers) - 1), min_size=1, max_size=9))
    parts = data.draw(st.lists(st.integers(0, len(numbers)), max_size=3))

    def read() -> Iterator[npt.NDArray[np.float64]]:
        yield from np.split(np.array(numbers), sorted(parts))

    found = order_statistics(read, ranks, count=len(numbers), in_memory=in_memory)
    assert found == [sorted(numbers)[rank] for rank in ranks]


@given(values=columns, buckets=st.integers(2, 20), group=st.integers(1, 70))
def test_quantile_edges_are_training_numbers_at_exact_ranks(
    values: list[float | None], buckets: int, group: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    train = staged(tmp_path_factory.mktemp("q"), values, group=group)
    wanted = sorted(present(values))
    if not wanted:
        with pytest.raises(Fault, match="no value in the training rows"):
            fit_boundaries(feature(**{"as": "buckets", "quantiles": buckets}), train)
        return
    edges = fit_boundaries(feature(**{"as": "buckets", "quantiles": buckets}), train)
    assert edges == sorted({wanted[i * (len(wanted) - 1) // buckets] for i in range(1, buckets)})
    near = np.quantile(wanted, [i / buckets for i in range(1, buckets)], method="lower")
    assert len(set(edges) - set(near.tolist())) <= sum(
        (i * (len(wanted) - 1)) % buckets == 0 for i in range(1, buckets)
    )


@given(values=columns, group=st.integers(1, 70))
def test_the_median_is_exact_whatever_the_partitions(
    values: list[float | None], group: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    train = staged(tmp_path_factory.mktemp("m"), values, group=group)
    if numbers := present(values):
        step = fit_scale(feature(fill="median", scale="none"), train)
        assert step["fill"] == pytest.approx(statistics.median(numbers), rel=1e-15, abs=1e-300)
        assert (step["mean"], step["std"]) == (0.0, 1.0)


@given(
    values=columns,
    fill=st.sampled_from(["mean", "median", 3.0]),
    clip=st.sampled_from([None, [-5.0, 100.0]]),
    log1p=st.booleans(),
    how=st.sampled_from(["standardize", "minmax", "none"]),
)
def test_steps_come_in_the_documented_order(
    values: list[float | None], fill: Any, clip: Any, log1p: bool, how: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    numbers = present(values)
    if not numbers and isinstance(fill, str):
        return
    train = staged(tmp_path_factory.mktemp("s"), values, group=7)
    step = fit_scale(feature(fill=fill, clip=clip, log1p=log1p, scale=how), train)
    filled = {"mean": statistics.fmean, "median": statistics.median}.get(fill, lambda _: fill)(numbers)
    x = [filled if v is None or math.isnan(v) else v for v in values]
    x = [min(max(v, clip[0]), clip[1]) for v in x] if clip else x
    x = [math.log1p(max(v, 0.0)) for v in x] if log1p else x
    mean, std = {
        "standardize": (statistics.fmean(x), statistics.pstdev(x)),
        "minmax": (min(x), max(x) - min(x)),
        "none": (0.0, 1.0),
    }[how]
    if std > 1e-9 * max(map(abs, x)) and std > 1e-100:  # squares of smaller deviations leave float64
        packed = np.array([MISSING_NUMBER if v is None else v for v in values])
        np.testing.assert_allclose(scale(packed, step), [(v - mean) / std for v in x], rtol=1e-6, atol=1e-6)


def test_epoch_seconds_keep_their_deviation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    seconds = 1.7e9 + 10 * rng.standard_normal(200_000)
    step = fit_scale(feature(), staged(tmp_path, [*seconds.tolist(), None], group=999))
    exact = statistics.fmean(seconds.tolist())
    assert abs(step["mean"] - exact) < 1e-5 and abs(step["fill"] - exact) < 1e-5
    assert step["std"] == pytest.approx(math.sqrt(math.fsum((s - exact) ** 2 for s in seconds) / 200_001), rel=1e-9)


@pytest.mark.parametrize("how", ["standardize", "minmax"])
def test_a_column_of_one_number_keeps_its_unit(tmp_path: Path, how: str) -> None:
    step = fit_scale(feature(scale=how), staged(tmp_path, [0.1] * 999 + [None]))
    assert scale(np.array([0.1, 1.1, MISSING_NUMBER, math.nan]), step).tolist() == [0.0, 1.0, 0.0, 0.0]


def test_numbers_too_large_for_a_mean_are_refused(tmp_path: Path) -> None:
    train = staged(tmp_path, [1.7e308, 1.7e308, -1.7e308, 0.0])
    for settings in ({}, {"scale": "minmax", "fill": 0.0}):
        with pytest.raises(Fault, match=r"features\.x: got numbers too large"):
            fit_scale(feature(**settings), train)
    assert math.isfinite(fit_scale(feature(clip=[-1.0, 1.0], fill=0.0), train)["std"])


def test_nan_is_missing_in_every_kind_of_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = {"x": [1.0, math.nan, 3.0, None], "click": [0, 1, 1, 0]}
    pq.write_table(pa.table(rows), "rows.parquet")
    raw = {
        "data": {"format": "parquet"} | {name: ["rows.parquet"] for name in ("train", "valid", "test")},
        "tasks": [{"name": "click"}],
        "features": [
            {"type": "numeric", "name": "d", "column": "x", "scale": "none"},
            {"type": "numeric", "name": "m", "column": "x", "fill": "median", "scale": "minmax"},
            {"type": "numeric", "name": "f", "column": "x", "as": "field", "fill": 9.0, "scale": "none"},
            {"type": "numeric", "name": "b", "column": "x", "as": "buckets", "boundaries": [2.0]},
            {"type": "numeric", "name": "q", "column": "x", "as": "buckets", "quantiles": 2},
        ],
    }
    run(parse(raw, place="x", into=FeatureSpec), Path("data"), report=lambda stage, rows, total=None: None)
    train = pq.read_table("data/train").to_pydict()
    assert train["d"] == [1.0, 2.0, 3.0, 2.0] and train["m"] == [0.0, 0.5, 1.0, 0.5]
    assert train["f:value"] == [1.0, 9.0, 3.0, 9.0]
    assert train["b"] == [1, 0, 2, 0] and train["q"] == [2, 0, 2, 0]


def test_nan_never_lands_in_the_top_bucket() -> None:
    assert bucket_keys(np.array([math.nan, 5.0]), [1.0]).tolist() == [MISSING_KEY, 1]


def test_the_older_key_says_the_same() -> None:
    assert feature(standardize=False) == feature(scale="none") and feature(standardize=True) == feature()
    with pytest.raises(ValueError, match="contradict"):
        feature(standardize=True, scale="none")
    with pytest.raises(ValueError, match="Extra inputs"):
        feature(standardize="no")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("C8..C11", ["C8", "C9", "C10", "C11"]),
        ("d08..d11", ["d08", "d09", "d10", "d11"]),
        ("C0..C2", ["C0", "C1", "C2"]),
        ("day1_2..day1_3", ["day1_2", "day1_3"]),
        ("x5..x5", ["x5"]),
        ("plain", ["plain"]),
    ],
)
def test_a_range_names_its_columns(text: str, wanted: list[str]) -> None:
    assert expanded([text]) == wanted


@pytest.mark.parametrize(
    "text",
    ["C3..C1", "C1..D3", "C1..", "..C3", "C1...C3", "C..C3", "C1..C3..C5", "C01..C3", "1..3", "C1..C99999", "C１..C３"],
)
def test_a_malformed_range_is_a_fault_at_its_place(text: str) -> None:
    raw = {
        "data": {"train": ["a"], "test": ["b"]},
        "tasks": [{"name": "click"}],
        "features": [{"type": "categorical", "columns": [text]}],
    }
    with pytest.raises(Faults, match=r"x: features\.0\.categorical\.columns\.0: .*is not a range of one stem"):
        parse(raw, place="x", into=FeatureSpec)


def test_blocks_with_ranges_become_a_feature_a_column() -> None:
    raw = {
        "data": {"train": ["a"], "test": ["b"]},
        "tasks": [{"name": "click"}],
        "features": [
            {"type": "numeric", "columns": ["I1..I13"], "log1p": True},
            {"type": "categorical", "columns": ["site", "C1..C26"], "min_count": 3},
        ],
    }
    spec = parse(raw, place="x", into=FeatureSpec)
    names = [feature.name for feature in resolve(spec.features)]
    assert names == [f"I{i}" for i in range(1, 14)] + ["site"] + [f"C{i}" for i in range(1, 27)]
    assert spec.raw_columns()["I13"] == "float64" and spec.raw_columns()["C26"] == "string"
    with pytest.raises(Faults, match="named twice: C2"):
        parse(raw | {"features": [{"type": "categorical", "columns": ["C1..C3", "C2"]}]}, place="x", into=FeatureSpec)
