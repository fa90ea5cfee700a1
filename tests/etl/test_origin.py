"""Every row of a dataset folder is found again in its raw file, whatever divided, dropped or drew rows."""

import gzip
import json
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from etl.cli import app
from etl.experiment_file import parse
from etl.origin import origin_path, raw_place
from etl.run import run
from etl.spec import FeatureSpec

FILES = {"day_0": 70, "day_1": 1, "day_2": 120, "valid": 50, "test": 40}
OWN = {"train": ["day_*"], "valid": ["valid"], "test": ["test"]}
DIVIDED = {"train": ["day_*"]}
SPLITS: dict[str, dict[str, Any]] = {
    "files of their own": OWN,
    "by row": DIVIDED | {"split": {"by": "row", "valid_fraction": 0.3, "test_fraction": 0.2, "seed": 3}},
    "by row, a test of its own": {"train": ["day_*"], "test": ["test"]} | {"split": {"valid_fraction": 0.3}},
    "a validation of its own": {"train": ["day_*"], "valid": ["valid"]} | {"split": {"test_fraction": 0.3}},
    "by group": DIVIDED | {"split": {"by": "group", "column": "user", "test_fraction": 0.2}},
    "by time": DIVIDED | {"split": {"by": "time", "column": "time", "test_fraction": 0.2}},
    "last": DIVIDED | {"split": {"by": "last", "column": "user", "time": "time"}},
}
HISTORY = {"user": "user", "time": "time", "columns": {"seen": "item"}, "max_length": 3, "min_length": 1}
DERIVED: dict[str, dict[str, Any]] = {
    "as it is": {},
    "histories": {"histories": [HISTORY]},
    "negatives": {"negatives": {"item": "item", "user": "user", "positive": "click", "count": 2}},
    "both": {"histories": [HISTORY], "negatives": {"item": "item", "exclude": "event", "count": 1}},
}


def silent(stage: str, rows: int, *, total: int | None = None) -> None:
    """Nobody watches."""


def rows_of(first_key: int, rows: int) -> dict[str, np.ndarray[Any, Any]]:
    """Rows whose `key` no other row has, out of the order of time."""
    rng = np.random.default_rng(first_key)
    integers = {"user": (0, 12), "item": (0, 80), "time": (1_000, 9_000), "click": (0, 2)}
    return {"key": np.arange(first_key, first_key + rows)} | {n: rng.integers(*b, rows) for n, b in integers.items()}


def text(names: list[str], columns: dict[str, np.ndarray[Any, Any]], *, delimiter: str) -> str:
    """A table with what is no row: an empty first line, comments and empty lines in between."""
    lines = ["", delimiter.join(names)]
    for at, values in enumerate(zip(*columns.values(), strict=True)):
        lines += ["# a comment"] * (at % 7 == 0) + [""] * (at % 11 == 0) + [delimiter.join(map(str, values))]
    return "\n".join(lines)


def svm(columns: dict[str, np.ndarray[Any, Any]]) -> str:
    """The key as a value."""
    shown = [columns[name] for name in ("key", "item", "click")]
    lines = [f"{click} {item}:{key}" for key, item, click in zip(*shown, strict=True)]
    return "".join(f"{line}\n" + "\n# a comment\n" * (at % 5 == 0) for at, line in enumerate(lines))


def write_files(kind: str) -> str:
    """Raw files of one kind; returns how their names end."""
    ending = {"csv": ".csv.gz", "tsv": ".tsv", "libsvm": ".svm", "parquet": ".parquet"}[kind]
    starts = accumulate(FILES.values(), initial=0)
    for (name, rows), first in zip(FILES.items(), starts, strict=False):
        columns, path = rows_of(first, rows), Path(f"{name}{ending}")
        if kind == "parquet":
            pq.write_table(pa.table(columns), path, row_group_size=25)
        elif kind == "csv":
            path.write_bytes(gzip.compress(text(list(columns), columns, delimiter=",").encode()))
        else:
            path.write_text(svm(columns) if kind == "libsvm" else text(list(columns), columns, delimiter="\t"))
    return ending


def spec(kind: str, ending: str, data: dict[str, Any], derived: dict[str, Any]) -> FeatureSpec:
    named = {key: [f"{name}{ending}" for name in value] if key in OWN else value for key, value in data.items()}
    bag = {"type": "bag", "name": "ids", "max_length": 1, "weight_column": "values", "dtype": "int64"}
    features: list[Any] = [{"type": "numeric", "name": "key", "scale": "none"}]
    features.append({"type": "categorical", "name": "item", "dtype": "int64"})
    if "histories" in derived:
        features.append({"type": "sequence", "name": "seen", "table": "item", "dtype": "int64", "max_length": 3})
    label = "label" if kind == "libsvm" else "click"
    raw = {
        "data": {"format": kind, "comment": None if kind == "parquet" else "#"} | named | derived,
        "features": [bag] if kind == "libsvm" else features,
        "tasks": [{"name": "click", "column": label}],
        "etl": {"rows_per_group": 16, "rows_per_shard": 50},
    }
    return parse(raw, place="x", into=FeatureSpec)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("etl.stage._GROUP_ROWS", 100)


def keys_of(folder: Path, split: str) -> tuple[list[int], list[float]]:
    """The keys and labels of a split's rows, in the order of its shards."""
    table = pa.concat_tables(pq.read_table(path) for path in sorted((folder / split).glob("*.parquet")))
    values = table["key"] if "key" in table.column_names else table["ids:value"].combine_chunks().flatten()
    return [int(value) for value in values.to_pylist()], table["click"].to_pylist()


def check(folder: Path, ending: str) -> dict[str, list[bool]]:
    """Each row's key is that of the raw row that is named; returns which rows were drawn."""
    starts, found = dict(zip(FILES, accumulate(FILES.values(), initial=0), strict=False)), {}
    for split in OWN:
        keys, labels = keys_of(folder, split)
        places = [str(raw_place(folder, split, number=number)) for number in range(len(keys))]
        found[split] = [place.startswith("drawn for ") for place in places]
        for key, label, place, drawn in zip(keys, labels, places, found[split], strict=True):
            file, _, row = place.removeprefix("drawn for ").partition(f"{ending}: row ")
            assert starts[file] + int(row) - 1 == key, (split, place, key)
            assert not (drawn and label), "drawn rows are no clicks"
    return found


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "libsvm"])
@pytest.mark.parametrize("by", ["files of their own", "by row", "by row, a test of its own", "a validation of its own"])
def test_a_row_is_that_of_the_file(kind: str, by: str) -> None:
    """Comments and empty lines are no rows."""
    ending, folder = write_files(kind), Path("data")
    run(spec(kind, ending, SPLITS[by], {}), folder, report=silent)
    assert not any(map(any, check(folder, ending).values()))
    assert origin_path(folder, "train").is_file() == (by != "files of their own"), "nothing is kept that files say"


@pytest.mark.parametrize("derived", DERIVED)
@pytest.mark.parametrize("by", SPLITS)
def test_whatever_divides_drops_or_draws(by: str, derived: str) -> None:
    ending, folder = write_files("parquet"), Path("data")
    run(spec("parquet", ending, SPLITS[by], DERIVED[derived]), folder, report=silent)
    drawn = check(folder, ending)
    count = DERIVED[derived].get("negatives", {}).get("count", 0)
    for split, of_split in drawn.items():
        _, labels = keys_of(folder, split)
        assert sum(of_split) == count * sum(labels), (split, "as many as were drawn for the positives")
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    kept = {f"origin/{split}.parquet" for split in OWN} if by != "files of their own" or DERIVED[derived] else set()
    assert {name for name in listed if name.startswith("origin/")} == kept


@pytest.mark.parametrize("engine", ["polars", "nvtabular"])
def test_both_engines_keep_the_order(engine: str) -> None:
    if engine == "nvtabular" and find_spec("nvtabular") is None:
        pytest.skip("the extra 'nvtabular' is not installed")
    ending, folder = write_files("parquet"), Path("data")
    found = spec("parquet", ending, SPLITS["by row"], DERIVED["both"])
    run(found.model_copy(update={"etl": found.etl.model_copy(update={"engine": engine})}), folder, report=silent)
    check(folder, ending)


def test_the_command() -> None:
    ending, folder = write_files("csv"), Path("data")
    run(spec("csv", ending, SPLITS["by row"], {}), folder, report=silent)
    keys, _ = keys_of(folder, "valid")
    done = CliRunner().invoke(app, ["locate", "data", "valid", "7", "0"])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines() == [raw_place(folder, "valid", number=number) for number in (7, 0)]
    for arguments, said in (
        (["data", "valid", "7", str(len(keys))], f"got no row {len(keys)} of valid; wanted rows from 0 to"),
        (["data", "dev", "7"], "got no split 'dev'; wanted one of train, valid, test"),
        (["nowhere", "valid", "7"], "nowhere/manifest.json: got no such file"),
    ):
        done = CliRunner().invoke(app, ["locate", *arguments])
        assert done.exit_code == 2 and said in done.output, done.output


def test_numbers_take_a_few_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("etl.stage._GROUP_ROWS", 65_536)
    names = {"train": ["many.parquet"], "split": {"test_fraction": 0.1, "valid_fraction": 0.1}}
    pq.write_table(pa.table(rows_of(0, 50_000)), "many.parquet")
    run(spec("parquet", "", names, {}), Path("data"), report=silent)
    rows = json.loads(Path("data/manifest.json").read_text())["splits"]["train"]["rows"]
    assert rows > 30_000 and origin_path(Path("data"), "train").stat().st_size * 8 / rows < 4


def test_a_folder_that_does_not_say_names_no_raw_row(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"hash": "x"}')
    assert raw_place(tmp_path, "train", number=0) is None
