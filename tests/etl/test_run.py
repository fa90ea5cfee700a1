"""The whole job on real and on broken files."""

import errno
import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from etl.cli import app
from etl.run import run, up_to_date
from etl.schema import read_schema
from etl.sources import read_rows
from etl.spec import FeatureSpec

SPEC: dict[str, Any] = {
    "data": {"train": ["train.csv"], "test": ["test.csv"], "null_values": ["?", ""], "comment": "#"},
    "tasks": [{"name": "click"}],
    "features": [
        {"type": "categorical", "name": "user", "dtype": "int64", "min_count": 2},
        {"type": "categorical", "name": "city"},
        {"type": "numeric", "name": "age", "fill": 30.0, "log1p": True},
        {"type": "numeric", "name": "age_bucket", "column": "age", "as": "buckets", "boundaries": [20.0, 40.0]},
        {"type": "cross", "name": "city_x_age", "inputs": ["city", "age_bucket"], "hash_rows": 100},
    ],
}


def csv(rows: int, *, seed: int) -> str:
    rng = np.random.default_rng(seed)
    lines = ["user,city,age,click"]
    for _ in range(rows):
        city = rng.choice(["Bern", "Zürich", "?", " Basel "])
        lines.append(f"{2**62 + rng.integers(50)}, {city},{rng.choice(['', '17', '35.5', ' 61'])},{rng.integers(2)}")
    return "\n".join(lines) + "\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("train.csv").write_text("# a remark\n" + csv(400, seed=0))
    Path("test.csv").write_text(csv(100, seed=1))
    Path("x.json").write_text(json.dumps(SPEC))
    return tmp_path


def silent(stage: str, rows: int, *, total: int | None = None) -> None:
    """Nobody watches."""


def toml(spec: dict[str, Any]) -> str:
    def value(v: object) -> str:
        if isinstance(v, dict):
            return "{" + ", ".join(f"{k} = {value(w)}" for k, w in v.items()) + "}"
        return "[" + ", ".join(map(value, v)) + "]" if isinstance(v, list) else json.dumps(v)

    return "\n".join(f"{key} = {value(part)}" for key, part in spec.items())


def etl(*arguments: str, spec: dict[str, Any] = SPEC) -> tuple[int, str]:
    Path("x.toml").write_text(toml(spec))
    result = CliRunner().invoke(app, ["run", "x.toml", *arguments])
    return result.exit_code, result.output


def test_the_folder_says_what_the_rows_say(folder: Path) -> None:
    spec = FeatureSpec.model_validate(SPEC)
    manifest = run(spec, Path("data"), report=silent)
    raw = pl.read_csv("train.csv", comment_prefix="#", null_values=["?"], infer_schema=False).with_columns(
        pl.all().str.strip_chars()
    )
    assert manifest["splits"]["train"]["rows"] + manifest["splits"]["valid"]["rows"] == 400
    train = pl.read_parquet("data/train/*.parquet")
    users = pl.read_parquet("data/transform/vocabulary/user.parquet")
    assert users["row"].to_list() == list(range(1, users.height + 1)) and users["count"].min() >= 2
    assert users["count"].to_list() == sorted(users["count"].to_list(), reverse=True)
    assert manifest["splits"]["test"]["rows"] == 100 == pl.read_parquet("data/test/*.parquet").height
    assert set(train["age_bucket"].unique()) == {0, 1, 2, 3} and train["age"].null_count() == 0
    cities = pl.read_parquet("data/transform/vocabulary/city.parquet")["value"].to_list()
    assert sorted(cities) == ["Basel", "Bern", "Zürich"]
    test_raw = pl.read_csv("test.csv", infer_schema=False).with_columns(pl.all().str.strip_chars())
    reference = dict(zip(users["value"].to_list(), users["row"].to_list(), strict=True))
    assert pl.read_parquet("data/test/*.parquet")["user"].to_list() == [
        reference.get(int(u), 0) for u in test_raw["user"]
    ]
    assert manifest["splits"]["test"]["features"]["city"]["missing"] == (test_raw["city"] == "?").sum()
    assert raw.height == 400


def test_validation_and_test_rows_do_not_reach_the_state(folder: Path) -> None:
    spec = FeatureSpec.model_validate(SPEC)
    run(spec, Path("a"), report=silent)
    Path("test.csv").write_text(csv(100, seed=9).replace("Bern", "Chur"))
    run(spec, Path("b"), report=silent)
    for name in ("transform.json", "vocabulary/city.parquet", "vocabulary/user.parquet"):
        assert (Path("a/transform") / name).read_bytes() == (Path("b/transform") / name).read_bytes()


def test_the_split_depends_on_seed_and_position_alone(folder: Path) -> None:
    def users(out: str, **split: float) -> list[int]:
        spec = FeatureSpec.model_validate(SPEC | {"data": SPEC["data"] | {"split": split}})
        run(spec, Path(out), report=silent)
        return pl.read_parquet(f"{out}/valid/*.parquet")["age"].to_list()

    assert users("a", seed=1) == users("b", seed=1)
    assert users("c", seed=2) != users("a", seed=1)


def test_a_column_of_weights_goes_beside_the_rows_in_every_split(folder: Path) -> None:
    """As text and as typed parquet; the same column may be a feature too."""
    rows = pl.read_csv("test.csv").select(pl.all().cast(pl.Float64, strict=False).fill_null(1.5).name.keep())
    rows = rows.select(user=pl.col("user").cast(pl.Int64), weight=pl.col("age"), click=pl.col("click"))
    rows.write_csv("weighed.csv")
    rows.write_parquet("weighed.parquet")
    for form in ("csv", "parquet"):
        files = {name: [f"weighed.{form}"] for name in ("train", "valid", "test")}
        data = files | {"format": form, "weight": "weight"}
        spec = {"tasks": SPEC["tasks"], "features": SPEC["features"][:1], "data": data}
        run(FeatureSpec.model_validate(spec), Path(form), report=silent)
        for split in files:
            held = pl.read_parquet(f"{form}/{split}/*.parquet")
            assert held["weight:"].dtype == pl.Float32 and held["weight:"].to_list() == rows["weight"].to_list()
        assert read_schema(Path(form)).weight


def test_shards_hold_every_row_once(folder: Path) -> None:
    run(FeatureSpec.model_validate(SPEC), Path("one"), report=silent)
    run(
        FeatureSpec.model_validate(SPEC | {"etl": {"rows_per_shard": 70, "rows_per_group": 16}}),
        Path("many"),
        report=silent,
    )
    assert len(list(Path("many/train").iterdir())) > 4
    assert pl.read_parquet("one/train/*.parquet").equals(pl.read_parquet("many/train/*.parquet"))


def test_up_to_date_follows_spec_and_files(folder: Path) -> None:
    spec = FeatureSpec.model_validate(SPEC)
    run(spec, Path("data"), report=silent)
    assert up_to_date(spec, Path("data"))
    other = FeatureSpec.model_validate(SPEC | {"etl": {"rows_per_shard": 5}})
    assert other.data_hash() != spec.data_hash() and not up_to_date(other, Path("data"))
    Path("train.csv").write_text(csv(400, seed=3))
    assert not up_to_date(spec, Path("data"))


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("train.csv", None, "no file 'train.csv'"),
        ("train.csv", "", "Empty CSV"),
        ("train.csv", "user,city,age,click\n", "no rows"),
        ("train.csv", "user,city,click\n1,Bern,1\n", "age"),
        ("train.csv", "user,city,age,click\n1,Bern,old,1\n2,Bern,3,0\n", "column 'age': got .*'old'.*wanted numbers"),
        ("train.csv", "user,city,age,click\n1.5,Bern,1,1\n2,Bern,3,0\n", "column 'user': got .*wanted whole numbers"),
        ("train.csv", "user,city,age,click\n1,Bern,1,2\n2,Bern,3,0\n", "'2' as label 1 .*wanted 0 or 1"),
        ("train.csv", "user,city,age,click\n1,Bern,1,1\n2,Bern,3,1\n3,Bern,3,1\n", "only class 1 for task 'click'"),
        ("train.csv", "user,city,age,click\n1,Bern,1\n", "Expected 4 columns, got 3"),
        ("test.csv", "user,city,age,click\n1,Bern,inf,1\n", "got infinity"),
    ],
)
def test_bad_files_end_with_code_2_and_leave_nothing(folder: Path, file: str, text: str | None, message: str) -> None:
    Path(file).unlink()
    if text is not None:
        Path(file).write_text(text)
    code, output = etl("--out", "data", "--set", "data.split.valid_fraction=0.3")
    assert code == 2 and "Traceback" not in output
    assert "remedy: " in output
    import re

    assert re.search(message, output), output
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == []


def test_truncated_gzip(folder: Path) -> None:
    whole = gzip.compress(csv(4000, seed=0).encode())
    Path("train.csv.gz").write_bytes(whole[: len(whole) // 2])
    code, output = etl("--out", "data", "--set", 'data.train=["train.csv.gz"]')
    assert code == 2 and "train.csv.gz" in output and not Path("data").exists(), output


def test_all_faults_of_the_file_at_once(folder: Path) -> None:
    bad = SPEC | {"colour": 1, "data": SPEC["data"] | {"format": "xls", "trian": []}, "etl": {"rows_per_shard": 0}}
    code, output = etl(spec=bad)
    assert code == 2
    for place in ("colour", "data.format", "data.trian", "etl.rows_per_shard"):
        assert f"x.toml: {place}" in output


def test_a_folder_that_is_not_ours_is_not_replaced(folder: Path) -> None:
    Path("home").mkdir()
    Path("home/letter.txt").write_text("dear")
    code, output = etl("--out", "home")
    assert code == 2 and "manifest.json" in output and Path("home/letter.txt").read_text() == "dear"


def test_inspect(folder: Path) -> None:
    etl("--out", "data")
    result = CliRunner().invoke(app, ["inspect", "data", "--json"])
    found = json.loads(result.output)
    assert found["splits"]["test"]["rows"] == 100
    user = next(f for f in found["features"] if f["name"] == "user")
    assert 0 <= user["unseen"]["test"] < 1 and user["psi"]["valid"] >= 0
    assert "age_bucket" in CliRunner().invoke(app, ["inspect", "data"]).output
    assert CliRunner().invoke(app, ["inspect", "nowhere"]).exit_code == 2


def test_a_column_that_no_json_line_names_stays_absent(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 9223372036854775807, "z": 1}\n{"a": null}\n')
    table = read_rows(tmp_path / "rows.jsonl", {"a": "int64", "b": "string"})
    assert table.column_names == ["a", "z"] and table["a"].to_pylist() == [2**63 - 1, None]


def test_what_the_system_refuses_is_a_fault(folder: Path) -> None:
    """A file where a folder has to be, and a place that takes no files."""
    Path("file").write_text("")
    assert etl("--out", "data")[0] == 0
    for command in (
        ["run", "x.toml", "--out", "file/data"],
        ["inspect", "x.toml"],
        ["inspect", "data", "--html", "/proc/page.html"],
        ["run", "x.toml/none.toml"],
        ["run", "x.toml", "--out", "/proc/data"],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2 and result.output.count("\n") == 1, (command, result.output)
        assert "wanted" in result.output and "remedy" in result.output and "Traceback" not in result.output


def test_a_full_disk_is_a_fault_and_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    code, output = etl("--out", "data")
    assert code == 2 and "No space left on device" in output and "the space on the disk" in output
    assert [path.name for path in folder.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("cut", [True, False])
def test_a_folder_that_has_lost_a_file_is_made_anew(folder: Path, cut: bool) -> None:
    spec = FeatureSpec.model_validate(SPEC)
    run(spec, Path("data"), report=silent)
    shard = Path("data/valid/part-00000.parquet")
    shard.write_bytes(shard.read_bytes()[:-1]) if cut else shard.unlink()
    result = CliRunner().invoke(app, ["inspect", "data"])
    assert result.exit_code == 2 and "data: got 1 of its files lost or cut, such as valid/part-00000" in result.output
    assert not up_to_date(spec, Path("data"))
    run(spec, Path("data"), report=silent)
    assert up_to_date(spec, Path("data"))
