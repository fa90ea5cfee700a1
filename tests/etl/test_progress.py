"""Rows per second and the time left: from the beginning of a stage, also of text files and without a terminal."""

import gzip
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from etl.cli import app
from etl.data_spec import Data
from etl.experiment_file import parse
from etl.formats import row_total
from etl.progress import Progress
from etl.run import run
from etl.spec import FeatureSpec


class Clock:
    """A time that is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_a_line_is_printed_every_half_minute(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress(clock=clock) as report:
        for seconds, rows in ((5, 0), (10, 1000), (32, 2700), (40, 3500), (65, 6000), (70, 9000)):
            clock.now = seconds
            report("read train", rows, total=9000)
        clock.now = 100
        report("fit train", 0)
        clock.now = 140
        report("fit train", 4)
    said = "read train: 2,700 rows, 100 rows/s, 1:03 left\nread train: 6,000 rows, 100 rows/s, 0:30 left\n"
    assert capsys.readouterr().err == f"{said}fit train: 0 rows, 0 rows/s\nfit train: 4 rows, 0 rows/s\n"


def test_a_short_job_prints_nothing_on_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as report:
        report("read train", 0, total=2)
        report("read train", 2, total=2)
    assert capsys.readouterr().err == ""


def test_on_a_terminal_a_line_a_stage_moves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    clock = Clock()
    with Progress(clock=clock) as report:
        report("read train", 0, total=90)
        clock.now = 2.0
        report("read train", 50, total=90)
        report._bar.refresh()
    said = capsys.readouterr().err
    assert "read train" in said and "25 rows/s" in said and "50 rows" in said


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz", "rows.csv.zst", "rows.csv.bz2"])
@pytest.mark.parametrize("rows", [40, 900_000])
def test_rows_of_text_are_estimated_from_its_first_bytes(tmp_path: Path, name: str, rows: int) -> None:
    text = "".join(f"{at * 7919 % 1000003},{at % 2}\n" for at in range(rows)).encode()
    path = tmp_path / name
    with pa.output_stream(str(path), compression="detect") as stream:
        stream.write(text)
    data = Data.model_validate({"train": ["x"], "test": ["x"]})
    found = row_total(data, [path, path])
    assert found is not None and abs(found - 2 * rows) <= 0.2 * rows
    assert row_total(data, [tmp_path / "gone.csv"]) is None
    (tmp_path / "empty.csv.gz").write_bytes(gzip.compress(b""))
    assert row_total(data, [tmp_path / "empty.csv.gz"]) == row_total(data, []) == 0


@pytest.mark.parametrize("format_", ["csv", "parquet"])
def test_every_stage_says_when_it_begins_and_the_fit_moves(tmp_path: Path, format_: str) -> None:
    files = {split: [str(tmp_path / f"rows.{format_}")] for split in ("train", "valid", "test")}
    (tmp_path / "rows.csv").write_text("a,b,click\n" + "1,x,0\n2,y,1\n" * 10)
    import polars as pl

    pl.read_csv(tmp_path / "rows.csv").write_parquet(tmp_path / "rows.parquet")
    features = [{"type": "categorical", "name": "b"}, {"type": "numeric", "name": "a"}]
    raw = {"data": files | {"format": format_}, "tasks": [{"name": "click"}], "features": features}
    heard: dict[str, list[tuple[int, int | None]]] = {}

    def report(stage: str, rows: int, *, total: int | None = None) -> None:
        heard.setdefault(stage, []).append((rows, total))

    run(parse(raw, place="x", into=FeatureSpec), tmp_path / "data", report=report)
    assert set(heard) == {f"{stage} {split}" for stage in ("read", "encode") for split in files} | {"fit train"}
    for said in heard.values():
        assert said[0][0] == 0 and said[-1][0] == 20 and None not in (total for _, total in said)
    assert [rows for rows, _ in heard["fit train"]] == [0, 7, 13, 20]


def test_a_command_without_a_terminal_leaves_stderr_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("city,click\na,1\nb,0\n")
    lines: list[Any] = ["data = { train = ['rows.csv'], valid = ['rows.csv'], test = ['rows.csv'] }", "[[tasks]]"]
    lines += ["name = 'click'", "[[features]]", "type = 'categorical'", "name = 'city'"]
    Path("x.toml").write_text("\n".join(lines))
    with pytest.raises(SystemExit):
        app(["run", "x.toml", "--out", "data"])
    assert capsys.readouterr().err == ""
