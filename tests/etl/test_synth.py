"""Synthetic clicks: equal seeds, known probabilities, and a signal that is where it is said to be."""

import gzip
import hashlib
import json
import re
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import etl.synth.write as writing
from etl.cli import app
from etl.faults import Fault
from etl.synth.criteo import NAMES, NUMBERS, Criteo
from etl.synth.draws import Draws, zipf
from etl.synth.events import DAY_MS, START_MS, Events
from etl.synth.options import Options
from etl.synth.truth import Ranking
from etl.synth.write import synth

ROWS, DAYS = 12_000, 3


def silent(stage: str, rows: int, *, total: int | None = None) -> None:
    """Nobody watches."""


def auc(scores: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> float:
    """From mean ranks (Mann and Whitney 1947)."""
    ranks = pl.Series(scores).rank("average").to_numpy()
    positives = int(labels.sum())
    return float((ranks[labels == 1].sum() - positives * (positives + 1) / 2) / (positives * (len(labels) - positives)))


def hashes(folder: Path) -> dict[str, str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> tuple[pl.DataFrame, dict[str, Any]]:
    """The rows of an event log beside their probabilities, and truth.json."""
    folder = tmp_path_factory.mktemp("events")
    options = Options(rows=ROWS, seed=5, days=DAYS, users=150, items=60, layout="events")
    found = synth(folder / "x", options, report=silent)
    assert json.loads((folder / "x" / "truth.json").read_text()) == found
    parts = [folder.glob("x/day_*.parquet"), folder.glob("x/truth/day_*.parquet")]
    rows, truth = (pl.concat([pl.read_parquet(path) for path in sorted(part)]) for part in parts)
    return rows.hstack(truth), found


@pytest.fixture(scope="module")
def criteo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("criteo") / "x"
    synth(folder, Options(rows=ROWS, seed=5, days=DAYS), report=silent)
    return folder


def raw(folder: Path, day: int) -> pl.DataFrame:
    path = folder / f"day_{day}.tsv.gz"
    return pl.read_csv(path, separator="\t", has_header=False, new_columns=list(NAMES), infer_schema=False)


@pytest.mark.parametrize("layout", ["criteo", "events"])
def test_equal_seeds_make_equal_bytes(tmp_path: Path, layout: str) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        synth(tmp_path / name, Options(rows=500, seed=seed, days=2, layout=layout), report=silent)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    other = hashes(tmp_path / "c")
    assert all(other[name] != digest for name, digest in hashes(tmp_path / "a").items())


@pytest.mark.parametrize("layout", ["criteo", "events"])
def test_rows_do_not_depend_on_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    options = Options(rows=700, seed=1, days=2, users=9, layout=layout, format="tsv")
    synth(tmp_path / "one", options, report=silent)
    monkeypatch.setattr(writing, "BATCH_ROWS", 37)
    synth(tmp_path / "many", options, report=silent)
    for day in ("day_0", "day_1"):
        assert (tmp_path / f"one/{day}.tsv").read_bytes() == (tmp_path / f"many/{day}.tsv").read_bytes()
        one, many = (pl.read_parquet(tmp_path / name / f"truth/{day}.parquet") for name in ("one", "many"))
        assert one.equals(many)


def test_the_formats_hold_the_same_rows(tmp_path: Path) -> None:
    for kind in ("parquet", "tsv", "tsv.gz"):
        options = Options(rows=200, seed=3, days=1, layout="events", format=kind)
        synth(tmp_path / kind, options, report=silent)
    text = (tmp_path / "tsv/day_0.tsv").read_bytes()
    assert gzip.decompress((tmp_path / "tsv.gz/day_0.tsv.gz").read_bytes()) == text
    typed = pl.read_parquet(tmp_path / "parquet/day_0.parquet")
    read = pl.read_csv(text, separator="\t", infer_schema=False)
    assert read.columns == typed.columns
    for name in ("timestamp", "user", "item", "category", "hour", "price", "user_clicks", "click"):
        assert read[name].cast(typed[name].dtype).equals(typed[name])
    joined = [None if not ids else "|".join(map(str, ids)) for ids in typed["history"].to_list()]
    assert [text or None for text in read["history"].to_list()] == joined


def test_the_criteo_layout(criteo: Path) -> None:
    lines = gzip.decompress((criteo / "day_0.tsv.gz").read_bytes()).decode().splitlines()
    assert len(lines) == ROWS // DAYS
    line = re.compile(r"[01](\t(-?\d+)?){13}(\t([0-9a-f]{8})?){26}")
    assert all(line.fullmatch(text) for text in lines)
    rows = pl.concat([raw(criteo, day) for day in range(DAYS)])
    numbers = rows.select(pl.col("^I.*$").cast(pl.Int64))
    assert numbers["I2"].min() < 0 and numbers["I5"].max() > 100_000
    assert all((numbers[name].mean() or 0) > (numbers[name].median() or 0) for name in ("I2", "I3", "I5", "I6", "I7"))
    for number, name in zip(NUMBERS, numbers.columns, strict=True):
        assert abs(numbers[name].null_count() / ROWS - number.nulls) < 0.02
    assert rows["C9"].n_unique() == 3 and rows["C20"].drop_nulls().n_unique() == 4
    assert 0.7 < rows["C22"].null_count() / ROWS < 0.82 and rows["C1"].null_count() == 0
    assert rows["C3"].n_unique() > 0.4 * ROWS
    first, second = rows["C7"].value_counts(sort=True)["count"].head(2)
    assert 1.3 < first / second < 2.2, "one over the rank would be log 2 to log 1.5, that is 1.7"


def test_users_and_items_set_the_sizes_of_two_columns() -> None:
    table, _ = Criteo(0, rows=3000, users=7, items=20).batch(0, 3000)
    assert len(table["C3"].unique().drop_null()) == 7 and len(table["C4"].unique().drop_null()) == 20


def test_the_files_agree_with_truth_json(criteo: Path) -> None:
    truth = json.loads((criteo / "truth.json").read_text())
    labels = [raw(criteo, day)["label"].cast(pl.Int64).to_numpy() for day in range(DAYS)]
    scores = [pl.read_parquet(criteo / f"truth/day_{day}.parquet")["p_click"].to_numpy() for day in range(DAYS)]
    assert truth["rows"] == ROWS and truth["seed"] == 5
    assert truth["click_rate"] == pytest.approx(np.concatenate(labels).mean())
    assert truth["auc"]["click"] == pytest.approx(auc(np.concatenate(scores), np.concatenate(labels)), abs=1e-5)
    for day, figures in enumerate(truth["days"]):
        assert figures["rows"] == len(labels[day]) and figures["click_rate"] == pytest.approx(labels[day].mean())
        assert figures["auc"]["click"] == pytest.approx(auc(scores[day], labels[day]), abs=1e-5)
    parts = truth["click_auc_of_parts"]
    assert 0.7 < parts["first_order"] < parts["pairs"] - 0.02 and parts["pairs"] == truth["auc"]["click"]


def test_the_event_layout(events: tuple[pl.DataFrame, dict[str, Any]]) -> None:
    rows, truth = events
    assert rows.height == truth["rows"] == ROWS
    assert ((rows["conversion"] == 1) & (rows["click"] == 0)).sum() == 0 and rows["conversion"].sum() > 100
    times = rows["timestamp"].to_numpy()
    assert (np.diff(times) > 0).all() and (times[0] - START_MS) // DAY_MS == 0
    assert np.bincount((times - START_MS) // DAY_MS).tolist() == [ROWS // DAYS] * DAYS
    assert ((times - START_MS) // 3_600_000 % 24 == rows["hour"].to_numpy()).all()
    hours = rows["hour"].value_counts().sort("hour")["count"].to_list()
    assert len(hours) == 24 and hours[4] < hours[16]
    assert rows.group_by("item").agg(pl.col("category").n_unique())["category"].max() == 1
    assert rows.group_by("user").agg(pl.col("segment").n_unique())["segment"].max() == 1
    first, last = (set(rows.filter(pl.Series((times - START_MS) // DAY_MS == day))["item"]) for day in (0, DAYS - 1))
    assert last - first, "new items appear"


def test_the_event_rates_and_auc(events: tuple[pl.DataFrame, dict[str, Any]]) -> None:
    rows, truth = events
    for task in ("click", "conversion"):
        labels, scores = rows[task].to_numpy(), rows[f"p_{task}"].to_numpy()
        assert truth[f"{task}_rate"] == pytest.approx(labels.mean())
        assert truth["auc"][task] == pytest.approx(auc(scores, labels), abs=1e-5)
    assert (rows["p_conversion"] < rows["p_click"]).all()
    parts = truth["click_auc_of_parts"]
    assert 0.6 < parts["first_order"] < parts["pairs"] - 0.03 < parts["history"] - 0.04


@pytest.mark.parametrize("task", ["click", "conversion"])
def test_labels_come_as_often_as_their_probabilities_say(
    events: tuple[pl.DataFrame, dict[str, Any]], task: str
) -> None:
    rows, _ = events
    for part in np.array_split(np.argsort(rows[f"p_{task}"].to_numpy()), 10):
        expected, labels = rows[f"p_{task}"].to_numpy()[part], rows[task].to_numpy()[part]
        assert abs(labels.sum() - expected.sum()) < 4.5 * np.sqrt((expected * (1 - expected)).sum()) + 1


def test_the_history_is_what_the_user_clicked_before(events: tuple[pl.DataFrame, dict[str, Any]]) -> None:
    clicked: dict[int, deque[tuple[int, int]]] = defaultdict(lambda: deque(maxlen=20))
    counts: dict[int, int] = defaultdict(int)
    longest = 0
    for row in events[0].iter_rows(named=True):
        before = clicked[row["user"]]
        assert row["history"] == [item for item, _ in before]
        assert row["history_category"] == [category for _, category in before]
        assert row["user_clicks"] == counts[row["user"]]
        longest = max(longest, len(before))
        if row["click"]:
            before.append((row["item"], row["category"]))
            counts[row["user"]] += 1
    assert longest == 20


def test_what_was_clicked_before_is_clicked_more(events: tuple[pl.DataFrame, dict[str, Any]]) -> None:
    """Pair and history effects, seen in the rows alone."""
    rows = events[0].filter(pl.col("history").list.len() >= 5)
    pairs = zip(rows["history_category"].to_list(), rows["category"].to_list(), strict=True)
    alike = pl.Series([history.count(category) / len(history) for history, category in pairs])
    much, none = (rows.filter(part)["click"].mean() for part in (alike >= 0.5, alike == 0))
    assert much > none + 0.1
    cells = events[0].group_by("segment", "category").agg(pl.col("click").mean(), n=pl.len()).filter(pl.col("n") > 50)
    means = cells.with_columns(
        rest=pl.col("click").mean().over("segment") + pl.col("click").mean().over("category") - pl.col("click").mean()
    )
    assert (means["click"] - means["rest"]).std() > 0.04, "segment and category interact"


@given(first=st.integers(0, 2**40), count=st.integers(1, 50), cut=st.integers(0, 50))
def test_draws_depend_on_the_position_alone(first: int, count: int, cut: int) -> None:
    draws, at = Draws(3), np.arange(first, first + count)
    whole = draws.uniform("a", at)
    parts = np.concatenate([draws.uniform("a", at[:cut]), draws.uniform("a", at[cut:])])
    assert (whole == parts).all() and (whole > 0).all() and (whole < 1).all()
    assert (draws.uniform("b", at) != whole).any()


def test_draws_are_those_of_splitmix64() -> None:
    """Three outputs of the published generator, from its definition in whole numbers."""
    draws = Draws(9)
    start, mask, wanted = int(draws.bits("s", np.array([0]))[0]), 2**64 - 1, []
    from etl.synth.draws import _key

    state = _key(9, "s")
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        wanted.append(z ^ z >> 31)
    assert start == wanted[0] and draws.bits("s", np.arange(3)).tolist() == wanted


def test_uniform_and_normal_draws_have_their_moments() -> None:
    at = np.arange(100_000)
    uniform, normal = Draws(0).uniform("u", at), Draws(0).normal("n", at)
    assert abs(uniform.mean() - 0.5) < 0.004 and abs(uniform.std() - 12**-0.5) < 0.004
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.02
    assert abs(np.corrcoef(uniform[1:], uniform[:-1])[0, 1]) < 0.02


def test_zipf_stays_within_its_values() -> None:
    edges = np.array([0.5**54, 0.25, 0.75, 1 - 2.0**-53])
    for size in (1, 2, 3, 1000, 10**6):
        ranks = zipf(edges, size)
        assert ranks.min() == 0 and ranks.max() == size - 1


@given(
    logits=st.lists(st.integers(-9, 9), min_size=2, max_size=40),
    seed=st.integers(0, 99),
    cut=st.integers(0, 40),
)
def test_the_streamed_auc_is_the_auc(logits: list[int], seed: int, cut: int) -> None:
    x, labels = np.array(logits, float), np.random.default_rng(seed).integers(0, 2, len(logits)).astype(bool)
    ranking, other = Ranking(), Ranking()
    ranking.add(x[:cut], labels[:cut])
    other.add(x[cut:], labels[cut:])
    ranking.merge(other)
    pairs = [(p > n) + (p == n) / 2 for p in x[labels] for n in x[~labels]]
    assert ranking.auc == (pytest.approx(np.mean(pairs)) if pairs else None)
    assert ranking.rate == labels.mean() and ranking.rows == len(x)


def test_a_crash_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synth(tmp_path / "x", Options(rows=100, seed=1, days=2, layout="events"), report=silent)
    before = hashes(tmp_path / "x")

    def fail(stage: str, rows: int) -> None:
        if rows > 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synth(tmp_path / "x", Options(rows=100, seed=2, days=2, layout="events"), report=fail)
    assert hashes(tmp_path / "x") == before and [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_that_is_not_ours_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(Fault, match=r"truth\.json"):
        synth(tmp_path, Options(rows=10, seed=1, days=1), report=silent)
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["synth", "x", "--rows", "900", "--seed", "4", "--days", "2", "--layout", "events", "--users", "30"]
    result = CliRunner().invoke(app, [*line, "--items", "20"])
    truth = json.loads(Path("x/truth.json").read_text())
    assert result.exit_code == 0 and f"AUC of the true probabilities {truth['auc']['click']:.4f}" in result.output
    assert sorted(path.name for path in Path("x").iterdir()) == [
        "day_0.parquet",
        "day_1.parquet",
        "truth",
        "truth.json",
    ]
    one_class = CliRunner().invoke(app, ["synth", "y", "--rows", "1", "--seed", "4", "--days", "1"])
    assert one_class.exit_code == 0 and "undefined" in one_class.output


def test_all_faults_of_the_command_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["synth", "x", "--rows=2", "--seed=-1", "--days=3", "--users=0", "--items=1", "--layout=ads", "--format=csv"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 2 and "Traceback" not in result.output and not Path("x").exists()
    for place in ("--rows", "--seed", "--users", "--items", "--layout", "--format"):
        assert f"{place}: got " in result.output


@pytest.mark.parametrize("users", [1, 2])
def test_very_few_users_and_items(users: int) -> None:
    events = Events(1, rows=100, days=1, users=users, items=2)
    table, known = events.batch(0, 100)
    assert len(table["user"].unique()) == users and len(table["item"].unique()) == 2
    assert np.isfinite(known.logits["conversion"]).all()
