"""The figures of a dataset folder against plain Python, and the page that shows them."""

import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import etl.profile as profile
from etl.cli import app
from etl.experiment_file import parse
from etl.faults import Fault
from etl.inspect import inspect
from etl.inspect_page import drift_word, write_page
from etl.profile import id_figures, psi, row_counts
from etl.run import run
from etl.spec import FeatureSpec

HOSTILE = "<script>alert('x')</script> & \"co\""
SPLITS = {"train": 500, "valid": 130, "test": 170}
SPEC: dict[str, Any] = {
    "data": {"format": "parquet"} | {split: [f"{split}.parquet"] for split in SPLITS},
    "tasks": [{"name": "click"}, {"name": "buy"}],
    "features": [
        {"type": "categorical", "name": "city", "min_count": 2},
        {"type": "categorical", "name": "user", "dtype": "int64"},
        {"type": "categorical", "name": "hashed", "column": "user", "dtype": "int64", "hash_rows": 30},
        {"type": "bag", "name": "tags", "max_length": 3},
        {"type": "numeric", "name": "age_bucket", "column": "age", "as": "buckets", "boundaries": [20.0, 40.0]},
        {"type": "numeric", "name": "weight", "column": "age", "as": "field"},
        {"type": "numeric", "name": "age"},
        {"type": "numeric", "name": "same"},
    ],
}


def silent(stage: str, rows: int, *, total: int | None = None) -> None:
    """Nobody watches."""


def raw_rows(count: int, *, seed: int, shift: int) -> pa.Table:
    """Rows whose cities and ages move with `shift`; some of everything is missing."""
    rng = np.random.default_rng(seed)
    cities = [HOSTILE, "Zürich", "Bern", *(f"town {at}" for at in range(20))]
    tags = [[f"t{v}" if v else None for v in rng.integers(0, 5, rng.integers(0, 4))] for _ in range(count)]
    return pa.table(
        {
            "city": [None if rng.random() < 0.1 else cities[int(rng.integers(9) * rng.random()) + shift] for _ in tags],
            "user": pa.array((2**62 + rng.integers(0, 60, count) + 20 * shift).tolist(), pa.int64()),
            "tags": pa.array(tags, pa.list_(pa.string())),
            "age": pa.array([None if rng.random() < 0.1 else float(rng.integers(10, 60) + 15 * shift) for _ in tags]),
            "same": [7.5] * count,
            "click": (rng.random(count) < np.linspace(0.1, 0.6, count)).astype(float),
            "buy": rng.integers(0, 2, count).astype(float),
        }
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset folder of many small shards and row groups, in a folder with a hostile name."""
    folder = tmp_path_factory.mktemp("inspect") / "<b>x"
    folder.mkdir()
    for at, (split, count) in enumerate(SPLITS.items()):
        pq.write_table(raw_rows(count, seed=at, shift=at), folder / f"{split}.parquet")
    files = {split: [str(folder / f"{split}.parquet")] for split in SPLITS}
    small = {"etl": {"rows_per_shard": 70, "rows_per_group": 16}}
    run(parse(SPEC | small | {"data": SPEC["data"] | files}, place="x", into=FeatureSpec), folder / "d", report=silent)
    return folder / "d"


@pytest.fixture(scope="module")
def found(data: Path) -> dict[str, Any]:
    return json.loads(json.dumps(inspect(data), allow_nan=False))


def column(data: Path, split: str, name: str) -> list[Any]:
    values = pq.read_table(data / split)[name].to_pylist()
    return [id_ for ids in values for id_ in ids] if isinstance(values[0], list) else values


def reference(expected: Sequence[float], actual: Sequence[float]) -> float:
    """The index as the two relative entropies added up, in plain Python."""
    p = [(n + 0.5) / (sum(expected) + 0.5 * len(expected)) for n in expected]
    q = [(n + 0.5) / (sum(actual) + 0.5 * len(actual)) for n in actual]
    kl = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return kl + math.fsum(b * math.log(b / a) for a, b in zip(p, q, strict=True))


counts = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1, max_size=12)


@given(pairs=counts)
def test_psi_is_the_symmetric_relative_entropy(pairs: list[tuple[int, int]]) -> None:
    expected, actual = zip(*pairs, strict=True)
    value = psi(expected, actual)
    if not sum(expected) or not sum(actual):
        assert value is None
        return
    assert value == pytest.approx(reference(expected, actual), abs=1e-9)
    assert value >= 0 and value == pytest.approx(psi(actual, expected))
    assert psi(expected, expected) == pytest.approx(0, abs=1e-12)


def test_psi_by_hand() -> None:
    """Shares .5 and .5 against .9 and .1: .4 ln 1.8 + .4 ln 5 = .8789."""
    assert psi([5e9, 5e9], [9e9, 1e9]) == pytest.approx(0.4 * math.log(1.8) + 0.4 * math.log(5), abs=1e-6)
    assert psi([100, 0], [0, 100]) == pytest.approx(2 * 100 / 101 * math.log(201)), "an empty bin counts a half"


def test_rows_and_label_rates(data: Path, found: dict[str, Any]) -> None:
    for split, rows in SPLITS.items():
        assert found["splits"][split]["rows"] == rows
        slices = found["label_rate_by_position"][split]
        assert sum(part["rows"] for part in slices) == rows and len(slices) == profile.SLICES
        for task in ("click", "buy"):
            labels = column(data, split, task)
            ones = sum(part["rows"] * part["label_rate"][task] for part in slices)
            assert ones == pytest.approx(sum(labels))
            assert found["splits"][split]["label_rate"][task] == pytest.approx(sum(labels) / rows)
            first = slices[0]
            assert first["label_rate"][task] == pytest.approx(np.mean(labels[: first["rows"]]))
        assert slices[-1]["label_rate"]["click"] > slices[0]["label_rate"]["click"]


def test_label_rates_by_file(data: Path, found: dict[str, Any]) -> None:
    counted = found["label_rate_by_day"]
    assert counted["by"] == "file"
    for split, rows in SPLITS.items():
        (part,) = counted["splits"][split]
        assert part["name"] == str(data.parent / f"{split}.parquet") and part["rows"] == rows
        assert part["label_rate"] == pytest.approx(found["splits"][split]["label_rate"])


DAYS = ["2024-02-28T23:59:59", "2024-02-29T00:00:00", "2024-03-01T12:00:00", "1969-12-31T23:00:00"]
SECONDS = [round(datetime.fromisoformat(f"{day}+00:00").timestamp()) for day in DAYS]


@pytest.mark.parametrize(
    ("times", "split", "by"),
    [
        (DAYS, {"by": "time", "column": "time", "valid_from": "2024-02-29", "test_from": "2024-03-01"}, "day"),
        (DAYS, {"by": "last", "column": "user", "time": "time"}, "day"),
        ([3, 2, 1, 0], {"by": "time", "column": "time", "valid_from": 1, "test_from": 2}, "file"),
        (SECONDS, {"by": "time", "column": "time", "valid_from": SECONDS[1], "test_from": SECONDS[2]}, "file"),
        (SECONDS, {"by": "time", "column": "time", "valid_fraction": 0.3, "test_fraction": 0.3, "unit": "s"}, "day"),
        ([1000 * at for at in SECONDS], {"by": "last", "column": "user", "time": "time", "unit": "ms"}, "day"),
        (DAYS, {"valid_fraction": 0.3, "test_fraction": 0.3}, "file"),
    ],
)
def test_label_rates_by_day(
    times: list[Any], split: dict[str, Any], by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A day is the split's own column of times; whole numbers without a unit say no day, so they count by file."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    seen: dict[str, list[int]] = {}
    for file in ("a", "b"):
        rows = [[at, f"u{rng.integers(9)}", int(rng.integers(2))] for at in rng.integers(0, 4, 100)]
        lines = ["time,user,click", *(f"{times[at]},{user},{click}" for at, user, click in rows)]
        Path(f"{file}.csv").write_text("\n".join(lines) + "\n")
        for at, _, click in rows:
            seen.setdefault(DAYS[at][:10] if by == "day" else f"{file}.csv", []).append(click)
    features = [{"type": "categorical", "name": "user"}]
    raw = {"data": {"train": ["a.csv", "b.csv"], "split": split}, "tasks": [{"name": "click"}], "features": features}
    manifest = run(parse(raw, place="x", into=FeatureSpec), Path("d"), report=silent)
    counted = inspect(Path("d"))["label_rate_by_day"]
    assert counted["by"] == by
    rows, ones = Counter[str](), Counter[str]()
    for name, counts in manifest["splits"].items():
        assert sum(part["rows"] for part in counts["label_parts"]["parts"]) == counts["rows"]
        for part in counted["splits"][name]:
            rows[part["name"]] += part["rows"]
            ones[part["name"]] += round(part["rows"] * part["label_rate"]["click"])
    assert rows == {name: len(clicks) for name, clicks in seen.items()}
    assert ones == {name: sum(clicks) for name, clicks in seen.items()}
    write_page(inspect(Path("d")), Path("p.html"))
    assert all(name in Path("p.html").read_text() for name in rows)


def test_a_folder_of_an_older_program_has_no_days(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "d")
    manifest = json.loads((data / "manifest.json").read_text())
    for split in manifest["splits"].values():
        del split["label_parts"]
    (tmp_path / "d" / "manifest.json").write_text(json.dumps(manifest))
    old = inspect(tmp_path / "d")
    assert old["label_rate_by_day"] is None
    write_page(old, tmp_path / "p.html")
    assert "By raw file" not in (tmp_path / "p.html").read_text()


def test_a_split_of_fewer_rows_than_parts(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    pq.write_table(pa.table({"click": [0.0, 1.0, 1.0]}), tmp_path / "test" / "part-00000.parquet")
    parts = profile.label_slices(tmp_path, "test", tasks=["click"], rows=3)
    assert [part["label_rate"]["click"] for part in parts] == [0, 1, 1]


@pytest.mark.parametrize("name", ["city", "user", "hashed", "tags", "age_bucket", "weight"])
def test_id_features_against_plain_python(data: Path, found: dict[str, Any], name: str) -> None:
    feature = next(f for f in found["features"] if f["name"] == name)
    counted = {split: Counter(column(data, split, name)) for split in SPLITS}
    manifest = json.loads((data / "manifest.json").read_text())["splits"]
    ranked = sorted((row for row in counted["train"] if row), key=lambda row: (-counted["train"][row], row))
    assert [top["row"] for top in feature["top"]] == ranked[:10]
    assert [top["count"] for top in feature["top"]] == [counted["train"][row] for row in ranked[:10]]
    total = {split: sum(part.values()) for split, part in counted.items()}
    bins = {}
    for split, part in counted.items():
        zero = (manifest[split]["features"][name][kind] for kind in ("missing", "unseen"))
        assert sum(zero) == part[0] == round((feature["missing"][split] + feature["unseen"][split]) * total[split])
        assert feature["values"][split] == total[split] and feature["distinct"][split] == len(set(part) - {0})
        shares = [top["share"][split] for top in feature["top"]]
        assert shares == pytest.approx([part[row] / total[split] for row in ranked[:10]])
        inner = [part[0], *(part[row] for row in ranked[:10])]
        bins[split] = [*inner, total[split] - sum(inner)]
    for split in ("valid", "test"):
        assert feature["psi"][split] == pytest.approx(reference(bins["train"], bins[split]))
    for k, share in feature["coverage"].items():
        assert share == pytest.approx(sum(counted["train"][row] for row in ranked[: int(k)]) / total["train"])
    assert int(list(feature["coverage"])[-1]) == len(ranked)


def test_top_values_have_their_texts(found: dict[str, Any]) -> None:
    by_name = {feature["name"]: feature["top"] for feature in found["features"]}
    assert HOSTILE in [top["value"] for top in by_name["city"]]
    assert all(2**62 <= int(top["value"]) < 2**62 + 60 for top in by_name["user"])
    texts = {top["row"]: top["value"] for top in by_name["age_bucket"]}
    assert texts == {1: "below 20", 2: "20 to 40", 3: "from 40"}
    assert {top["value"] for top in by_name["hashed"]} == {None}
    assert {top["value"] for top in by_name["tags"]} == {"t1", "t2", "t3", "t4"}


def test_dense_features_against_plain_python(data: Path, found: dict[str, Any]) -> None:
    age = next(dense for dense in found["dense"] if dense["name"] == "age")
    values = {split: np.array(column(data, split, "age"), np.float64) for split in SPLITS}
    deciles = sorted(set(np.quantile(values["train"], np.arange(1, 10) / 10)))
    bins = {
        split: [sum(sum(v >= edge for edge in deciles) == at for v in x) for at in range(len(deciles) + 1)]
        for split, x in values.items()
    }
    for split, x in values.items():
        wanted = {"mean": x.mean(), "std": x.std(), "min": x.min(), "max": x.max()}
        assert age["by_split"][split] == pytest.approx(wanted, abs=1e-9)
        edges = np.array(age["histogram"]["edges"])
        shares = np.histogram(x.clip(edges[0], edges[-1]), edges)[0] / len(x)
        assert np.abs(np.array(age["histogram"]["share"][split]) - shares).max() < 0.02
        assert sum(age["histogram"]["share"][split]) == pytest.approx(1)
        if split != "train":
            assert age["psi"][split] == pytest.approx(reference(bins["train"], bins[split]))
    assert age["psi"]["test"] > age["psi"]["valid"] > 0.1 and age["mean"] == age["by_split"]["train"]["mean"]


def test_missing_numbers_are_counted(data: Path, found: dict[str, Any], tmp_path: Path) -> None:
    for at, (split, count) in enumerate(SPLITS.items()):
        absent = raw_rows(count, seed=at, shift=at)["age"].null_count
        assert absent and [dense["missing"][split] for dense in found["dense"]] == [absent / count, 0.0]
    write_page(found, tmp_path / "page.html")
    shares = ", ".join(f"{split} {share:.1%}" for split, share in found["dense"][0]["missing"].items())
    assert f"Missing: {shares}." in (tmp_path / "page.html").read_text()
    printed = CliRunner().invoke(app, ["inspect", str(data), "--html", str(tmp_path / "page.html")]).output
    assert "missing" in printed.split("dense features")[1]
    older = json.loads((data / "manifest.json").read_text())
    older["splits"] = {name: {k: v for k, v in part.items() if k != "dense"} for name, part in older["splits"].items()}
    shutil.copytree(data, tmp_path / "older")
    (tmp_path / "older" / "manifest.json").write_text(json.dumps(older))
    assert inspect(tmp_path / "older")["dense"][0]["missing"] == dict.fromkeys(SPLITS)


def test_a_column_of_one_value(found: dict[str, Any]) -> None:
    same = next(dense for dense in found["dense"] if dense["name"] == "same")
    assert same["std"] == 0 and same["min"] == same["max"] and max(same["histogram"]["share"]["test"]) == 1
    assert same["psi"]["test"] < 0.01


def test_row_groups_and_the_sample_do_not_matter(
    data: Path, found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One shard of one row group gives the same figures; a sample of every second row gives nearly those."""
    shutil.copytree(data, tmp_path / "d")
    for split in SPLITS:
        table = pq.read_table(data / split)
        shutil.rmtree(tmp_path / "d" / split)
        (tmp_path / "d" / split).mkdir()
        pq.write_table(table, tmp_path / "d" / split / "part-00000.parquet")
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
    (tmp_path / "d" / "manifest.json").write_text(json.dumps(manifest | {"files": {}}))
    whole = json.loads(json.dumps(inspect(tmp_path / "d")))
    assert whole["features"] == found["features"] and whole["label_rate_by_position"] == found["label_rate_by_position"]
    for one, other in zip(whole["dense"], found["dense"], strict=True):
        assert one["psi"] == pytest.approx(other["psi"]) and one["histogram"] == other["histogram"]
    sampled = profile._sample(data, ["age"], rows=500)
    assert sampled[:, 0].tolist() == column(data, "train", "age")
    monkeypatch.setattr(profile, "_SAMPLED", 0)
    monkeypatch.setattr(profile, "_LEAST", 250)
    assert profile._sample(data, ["age"], rows=500)[:, 0].tolist() == column(data, "train", "age")[::2]


def test_a_feature_without_any_value(tmp_path: Path) -> None:
    for split, ids in (("train", [[1], [1, 2]]), ("valid", [[], []])):
        (tmp_path / split).mkdir()
        pq.write_table(pa.table({"h": pa.array(ids, pa.list_(pa.int64()))}), tmp_path / split / "part-00000.parquet")
    counted = {split: row_counts(tmp_path, split, name="h", listed=True) for split in ("train", "valid")}
    figures = id_figures(counted)
    assert figures["psi"] == {"valid": None} and figures["values"] == {"train": 3, "valid": 0}
    assert [top["share"] for top in figures["top"]] == [{"train": 2 / 3, "valid": 0}, {"train": 1 / 3, "valid": 0}]
    assert id_figures(dict.fromkeys(counted, counted["valid"]))["coverage"] == {}


class Page(HTMLParser):
    """Checks that tags nest; keeps headings and texts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag not in ("meta", "path"):
            self.open.append(tag)
        assert not any(name in ("src", "href") or name.startswith("on") for name, _ in attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag != "path":
            assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        self.texts.append(text)


def test_the_page(found: dict[str, Any], tmp_path: Path) -> None:
    write_page(found, tmp_path / "inspect.html")
    text = (tmp_path / "inspect.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == [] and page.tags["script"] == 0 and page.tags["b"] == text.count("<b class=")
    assert {"Labels", "Id features", "Dense features"} <= set(page.texts)
    assert HOSTILE in page.texts, "a value of the data stands there as a text"
    assert page.tags["details"] == 1 + len(found["features"]) and page.tags["svg"] == 4 + len(found["dense"])
    said = " ".join(page.texts)
    assert "strong shift" in said and "stable" in said and "not days" in said
    for split, rows in SPLITS.items():
        assert f"{split} rows" in page.texts and f"{rows:,}" in page.texts
    assert "nan" not in text.lower().replace("nanos", "")


def test_how_drift_is_read() -> None:
    read = [drift_word(value) for value in (0.0, 0.0999, 0.1, 0.2499, 0.25, None)]
    assert read == ["stable", "stable", "mild shift", "mild shift", "strong shift", "no values"]


def hashes(folder: Path) -> dict[Path, str]:
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_the_command_writes_the_page_beside_the_folder(data: Path, found: dict[str, Any], tmp_path: Path) -> None:
    before = hashes(data)
    printed = CliRunner().invoke(app, ["inspect", str(data), "--json"])
    assert json.loads(printed.output) == found and not (data.parent / "inspect.html").exists()
    tables = CliRunner().invoke(app, ["inspect", str(data)])
    assert tables.exit_code == 0 and "age_bucket" in tables.output and (data.parent / "inspect.html").is_file()
    both = CliRunner().invoke(app, ["inspect", str(data), "--json", "--html", str(tmp_path / "p.html")])
    assert json.loads(both.output) == found
    assert (tmp_path / "p.html").read_bytes() == (data.parent / "inspect.html").read_bytes()
    assert hashes(data) == before


@pytest.mark.parametrize(
    ("place", "message"), [("{data}/p.html", "in the dataset folder"), ("{tmp}/no/p.html", "no place")]
)
def test_a_page_in_the_wrong_place(data: Path, tmp_path: Path, place: str, message: str) -> None:
    line = ["inspect", str(data), "--html", place.format(data=data, tmp=tmp_path)]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output


def test_a_broken_folder(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "d")
    (tmp_path / "d" / "transform" / "transform.json").unlink()
    with pytest.raises(Fault, match=r"transform\.json"):
        inspect(tmp_path / "d")
