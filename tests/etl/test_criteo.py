"""The experiment files for Criteo's rows and for synthetic ones, on a few rows that `etl synth` makes."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner

from etl.cli import app
from etl.schema import Schema, read_schema

EXPERIMENTS = Path(__file__).parents[2] / "experiments" / "criteo"


def command(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def dataset(name: str, **files: list[str]) -> tuple[Schema, dict[str, Any]]:
    """Runs the experiment's ETL in the current folder, on these files instead of its own."""
    overrides = [part for split, paths in files.items() for part in ("--set", f"data.{split}={json.dumps(paths)}")]
    command("run", str(EXPERIMENTS / f"{name}.toml"), "--out", "data", *overrides)
    return read_schema(Path("data")), json.loads(Path("data/manifest.json").read_text())["splits"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_kaggle() -> None:
    command("synth", "criteo", "--rows", "3000", "--seed", "1", "--days", "2")
    schema, splits = dataset("kaggle", train=["criteo/day_*.tsv.gz"])
    assert schema.id_names == [f"C{at}" for at in range(1, 27)] and schema.dense_names[::12] == ["I1", "I13"]
    assert sum(split["rows"] for split in splits.values()) == 3000
    assert 200 < splits["valid"]["rows"] < 400 and 200 < splits["test"]["rows"] < 400
    assert min(pl.read_parquet("data/transform/vocabulary/C2.parquet")["count"]) >= 10
    train = pl.read_parquet("data/train/*.parquet")
    assert abs(train["I5"].mean() or 0) < 0.01 and train["I12"].null_count() == 0
    assert splits["train"]["features"]["C22"]["missing"] > 0.6 * splits["train"]["rows"]
    assert splits["test"]["features"]["C3"]["unseen"] > 0.3 * splits["test"]["rows"]


def test_terabyte() -> None:
    command("synth", "terabyte", "--rows", "2400", "--seed", "1", "--days", "4")
    days = [f"terabyte/day_{day}.tsv.gz" for day in range(4)]
    schema, splits = dataset("terabyte", train=days[:2], valid=days[2:3], test=days[3:])
    assert [splits[name]["rows"] for name in ("train", "valid", "test")] == [1200, 600, 600]
    assert sorted(schema.id_names) == sorted(f"C{at}" for at in range(1, 27)) and len(schema.dense) == 13
    hashed = {"C1", "C10", "C20", "C21", "C22"}
    assert {table.name for table in schema.tables if table.rows == 40_000_000} == hashed
    assert {path.stem for path in Path("data/transform/vocabulary").iterdir()} == set(schema.id_names) - hashed


def test_synth_as_its_first_lines_say() -> None:
    lines = [line.removeprefix("#   python -m ") for line in (EXPERIMENTS / "synth.toml").read_text().splitlines()[1:4]]
    synth, run, train = (line.split() for line in lines)
    assert synth[:2] == ["etl", "synth"] and run[:2] == ["etl", "run"] and train[:2] == ["recsys", "train"]
    assert run[2] == train[2] == "experiments/criteo/synth.toml"
    command(*synth[1:], "--rows", "3000", "--users", "100", "--items", "40")
    command("run", str(EXPERIMENTS / "synth.toml"))
    data = Path("out/synth/data")
    schema = read_schema(data)
    assert schema.task_names == ["click", "conversion"] and schema.group
    tables = {feature.name: feature.table for feature in schema.features}
    assert (tables["history"], tables["history_category"]) == ("item", "category")
    train = pl.read_parquet(data / "train/*.parquet")
    assert train.height == 1800 and train["history"].list.len().max() > 5
    assert (train["history"].list.len() == train["history_category"].list.len()).all()
    truth = json.loads(Path("out/synth/raw/truth.json").read_text())
    assert truth["days"][4]["click_rate"] == pytest.approx(pl.read_parquet(data / "test/*.parquet")["click"].mean())


@pytest.mark.parametrize("name", ["kaggle", "terabyte"])
def test_the_columns_are_those_of_the_layout(name: str) -> None:
    from etl.experiment_file import load_feature_spec
    from etl.synth.criteo import NAMES

    _, spec = load_feature_spec(EXPERIMENTS / f"{name}.toml", overrides=[])
    assert tuple(spec.data.columns) == NAMES and set(spec.raw_columns()) == set(NAMES) - {"label"}
