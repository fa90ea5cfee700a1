"""Histories from an event log against an obvious reference, on whatever logs."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etl.experiment_file import parse
from etl.faults import Fault, Faults
from etl.run import run
from etl.sources import read_raw_split
from etl.spec import FeatureSpec
from etl.splits import SPLITS
from etl.stage import stage

Event = tuple[str | None, int, int | None, str, int]
"""User, time, item, category, click."""

HISTORY = {"user": "user", "time": "time", "max_length": 3, "columns": {"past": "item", "past_category": "category"}}
SPEC: dict[str, Any] = {
    "tasks": [{"name": "click"}],
    "features": [
        {"type": "categorical", "name": "item", "dtype": "int64"},
        {"type": "sequence", "name": "past", "table": "item", "dtype": "int64", "max_length": 3},
        {"type": "sequence", "name": "past_category", "max_length": 3},
    ],
}


def silent(stage: str, rows: int, *, total: int | None = None) -> None:
    """Nobody watches."""


def write(path: Path, events: list[Event]) -> None:
    user, time, item, category, click = (list(part) for part in zip(*events, strict=True)) if events else [[]] * 5
    table = pa.table(
        {
            "user": pa.array(user, pa.string()),
            "time": pa.array(time, pa.int64()),
            "item": pa.array(item, pa.int64()),
            "category": pa.array(category, pa.string()),
            "click": pa.array(click, pa.int64()),
        }
    )
    pq.write_table(table, path, row_group_size=4)


def made(folder: Path, files: dict[str, list[list[Event]]], **history: object) -> FeatureSpec:
    """Writes the files of each split and names them."""
    data: dict[str, Any] = {"format": "parquet", "histories": [HISTORY | history]}
    for split, parts in files.items():
        data[split] = [f"{folder}/{split}{at}.parquet" for at in range(len(parts))]
        for path, events in zip(data[split], parts, strict=True):
            write(Path(path), events)
    return parse(SPEC | {"data": data}, place="x.toml", into=FeatureSpec)


def staged(spec: FeatureSpec, folder: Path) -> list[dict[str, Any]]:
    """The rows of all splits, one after the other."""
    stage(spec, folder, report=silent)
    tables = [pq.read_table(folder / f"{split}.parquet") for split in SPLITS]
    for path in folder.glob("*.parquet"):
        path.unlink()
    return [row for table in tables for row in table.to_pylist()]


def reference(events: list[Event], at: int, *, clicked: bool) -> list[Event]:
    """The newest three earlier events, oldest first."""
    user, time = events[at][:2]
    if user is None:
        return []
    before = [event for event in events if event[0] == user and event[1] < time and (event[4] or not clicked)]
    return sorted(before, key=lambda event: event[1])[-3:]


# Two rows that give training both classes; their user is in no log.
BOTH: list[Event] = [("other", 0, 1, "c", 0), ("other", 0, 1, "c", 1)]
events = st.lists(
    st.tuples(
        st.sampled_from(["u", "v", "é", None]),
        st.integers(-3, 5) | st.sampled_from([-(2**63), 2**63 - 1]),
        st.none() | st.integers(0, 5) | st.sampled_from([2**62 + 1, 2**62 + 3]),
        st.sampled_from(["a", "ß", ""]),
        st.integers(0, 1),
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(log=events, cuts=st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30)), clicked=st.booleans())
def test_histories_are_what_the_reference_says(
    log: list[Event], cuts: tuple[int, int, int], clicked: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    a, b, c = sorted(cuts)
    files = {"train": [log[:a], BOTH, log[a:b]], "valid": [log[b:c], BOTH], "test": [BOTH, log[c:]]}
    everything = [event for parts in files.values() for part in parts for event in part]
    folder = tmp_path_factory.mktemp("log")
    rows = staged(made(folder, files, where={"click": "1"} if clicked else {}), folder / ".")
    assert len(rows) == len(everything)
    for at, (row, event) in enumerate(zip(rows, everything, strict=True)):
        past = reference(everything, at, clicked=clicked)
        assert row["item"] == event[2], "rows keep their order"
        assert row["past"] == [each[2] for each in past] and row["past_category"] == [each[3] for each in past]


@settings(max_examples=40, deadline=None)
@given(log=events.filter(len), other=events.filter(len), now=st.integers(-3, 5))
def test_the_future_changes_no_history(
    log: list[Event], other: list[Event], now: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Rows at or after `now` are exchanged for others; those up to it keep their histories."""
    folder = tmp_path_factory.mktemp("log")
    past = [event for event in log if event[1] < now]
    present: list[Event] = [("u", now, 7, "a", 1), ("v", now, 8, "a", 0)]
    found = []
    for future in (log, other):
        later = [event for event in future if event[1] >= now]
        files = {"train": [BOTH, past, present], "valid": [[*later, *BOTH]], "test": [[*later, *BOTH]]}
        rows = staged(made(folder, files), folder / ".")
        found.append(rows[: len(BOTH) + len(past) + 2])
    assert found[0] == found[1]


def test_short_histories_stay_in_the_log_alone(tmp_path: Path) -> None:
    log: list[Event] = [("u", time, time, "a", time % 2) for time in range(1, 7)]
    files = {"train": [log[:5]], "valid": [log[5:]], "test": [log[5:]]}
    rows = staged(made(tmp_path, files, min_length=2), tmp_path / ".")
    assert [row["past"] for row in rows] == [[1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [3, 4, 5]]


def test_the_raw_test_rows_are_those_of_the_folder(tmp_path: Path) -> None:
    log: list[Event] = [("u" if at % 3 else "v", at * 7 % 11, at, "a", at % 2) for at in range(40)]
    spec = made(tmp_path, {"train": [log[:20], log[20:30]], "valid": [log[30:35]], "test": [log[35:]]})
    run(spec, tmp_path / "data", report=silent)
    raw = read_raw_split(spec, "test").to_pylist()
    words = pq.read_table(tmp_path / "data/transform/vocabulary/item.parquet").to_pydict()
    row = dict(zip(words["value"], words["row"], strict=True))
    encoded = pq.read_table(tmp_path / "data/test").to_pylist()
    assert len(encoded) == 5
    for one, other in zip(raw, encoded, strict=True):
        assert [row.get(item, 0) for item in one["past"]] == other["past"] and one["past"]
        assert row.get(one["item"], 0) == other["item"]


@pytest.mark.parametrize(
    ("times", "wanted"),
    [
        (["2024-01-02", "2024-01-01", "2024-01-03"], [[2], [], [2, 1]]),
        (["2024-01-02T00:00:00Z", "2024-01-02T01:00:00+02:00", "2024-01-02T00:00:00Z"], [[2], [], [2]]),
        (["10", "9", "10"], [[2], [], [2]]),
    ],
)
def test_times_in_text_are_times(tmp_path: Path, times: list[str], wanted: list[list[int]]) -> None:
    lines = [f"u,{time},{at + 1},a,{at % 2}" for at, time in enumerate(times)]
    (tmp_path / "rows.csv").write_text("\n".join(["user,time,item,category,click", *lines]) + "\n")
    (tmp_path / "other.csv").write_text(f"user,time,item,category,click\nw,{times[0]},1,a,1\n")
    other = [f"{tmp_path}/other.csv"]
    data = {"train": [f"{tmp_path}/rows.csv"], "valid": other, "test": other, "histories": [HISTORY]}
    rows = staged(parse(SPEC | {"data": data}, place="x", into=FeatureSpec), tmp_path)
    assert [row["past"] for row in rows[:3]] == wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": {"past": "item", "seen": "item"}}, "no sequence or bag reads the history column 'seen'"),
        ({"columns": {"past": "item", "past_category": "past"}}, "which is a history itself"),
        ({"columns": {"past": "item", "past_category": "item"}}, "'item' is read as int64 and as string"),
        ({"min_length": 4}, "'min_length' is above"),
        ({"columns": {}}, "histories.0.columns"),
    ],
)
def test_histories_that_do_not_fit(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(Faults, match=message):
        made(tmp_path, {"train": [BOTH], "valid": [BOTH], "test": [BOTH]}, **change)


def test_a_time_that_is_none_is_a_fault(tmp_path: Path) -> None:
    spec = made(tmp_path, {"train": [BOTH], "valid": [BOTH], "test": [BOTH]})
    table = pq.read_table(tmp_path / "train0.parquet")
    pq.write_table(table.set_column(1, "time", pa.array([1, None], pa.int64())), tmp_path / "train0.parquet")
    with pytest.raises(Fault, match=r"train0.parquet: rows 1 to 2, column 'time': got no value in row 2"):
        staged(spec, tmp_path)
