"""A job that is killed anywhere leaves the old folder or none, and the next one removes what lies beside it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from etl.artifact import new_folder, recover
from etl.cli import app
from etl.experiment_file import parse
from etl.run import run, up_to_date
from etl.spec import FeatureSpec

SPEC: dict[str, Any] = {
    "data": {"train": ["rows.csv"], "valid": ["rows.csv"], "test": ["rows.csv"]},
    "tasks": [{"name": "click"}],
    "features": [{"type": "categorical", "name": "city"}, {"type": "target", "name": "rate", "by": ["city"]}],
}
KILLED = """
import json, os, signal, sys
from pathlib import Path
from etl.cli import app
from etl.progress import Progress
stage, sent = sys.argv[1], int(sys.argv[2])
heard, replace = Progress.__call__, Path.replace
def report(progress, named, rows, *, total=None):
    heard(progress, named, rows, total=total)
    if named == stage:
        os.kill(os.getpid(), sent)
def replaced(path, target):
    replace(path, target)
    if stage == "swap" and str(target).endswith(".old"):
        os.kill(os.getpid(), sent)
Progress.__call__, Path.replace = report, replaced
app(["run", "x.toml", "--out", "data", "--set", "etl.rows_per_shard=5"])
"""


def silent(stage: str, rows: int, *, total: int | None = None) -> None:
    """Nobody watches."""


def spec(**etl: Any) -> FeatureSpec:
    return parse(SPEC | {"etl": etl}, place="x.toml", into=FeatureSpec)


def contents(folder: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("city,click\n" + "".join(f"c{at % 3},{at % 2}\n" for at in range(20)))
    lines = [f"data = {{ {', '.join(f'{name} = {json.dumps(files)}' for name, files in SPEC['data'].items())} }}"]
    lines += ["[[tasks]]", 'name = "click"', "[[features]]", 'type = "categorical"', 'name = "city"']
    lines += ["[[features]]", 'type = "target"', 'name = "rate"', 'by = ["city"]']
    Path("x.toml").write_text("\n".join(lines))
    return tmp_path


def folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def kill(stage: str, number: int) -> int:
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root}
    command = [sys.executable, "-c", KILLED, stage, str(number)]
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode


STAGES = ["read train", "fit train", "encode train"]


@pytest.mark.parametrize(
    ("stage", "old"), [*((stage, old) for stage in STAGES for old in (True, False)), ("swap", True)]
)
def test_a_killed_job_leaves_the_old_folder_or_none(folder: Path, stage: str, old: bool) -> None:
    before = {}
    if old:
        run(spec(), Path("data"), report=silent)
        before = contents("data")
    assert kill(stage, signal.SIGKILL) == -signal.SIGKILL
    assert len(folders(folder)) == 1 + (stage == "swap") + (old and stage != "swap"), "the job's own folder stays"
    recover(Path("data"))
    assert contents("data") == before and folders(folder) == (["data"] if old else [])
    run(spec(rows_per_shard=5), Path("data"), report=silent)
    assert up_to_date(spec(rows_per_shard=5), Path("data")) and folders(folder) == ["data"]


@pytest.mark.parametrize("stage", ["read train", "encode train", "swap"])
def test_a_job_that_is_told_to_end_removes_what_it_has_begun(folder: Path, stage: str) -> None:
    run(spec(), Path("data"), report=silent)
    before = contents("data")
    assert kill(stage, signal.SIGTERM) == 128 + signal.SIGTERM
    assert contents("data") == before and folders(folder) == ["data"]


def test_what_other_processes_still_write_stays(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (gone := tmp_path / f".data.{os.uname().nodename}.{ended.pid}.partial").mkdir()
    (scratch := tmp_path / f".data.{os.uname().nodename}.{ended.pid}.partial.x1y2").mkdir()
    (other := tmp_path / f".data2.{os.uname().nodename}.{ended.pid}.partial").mkdir()
    (running := tmp_path / f".data.{os.uname().nodename}.{os.getppid()}.partial").mkdir()
    (elsewhere := tmp_path / f".data.another-host.{ended.pid}.partial").mkdir()
    (kept := tmp_path / f".data.{os.uname().nodename}.{ended.pid}.old.bak").mkdir()
    with new_folder(tmp_path / "data", marker="m") as folder:
        assert not gone.exists() and not scratch.exists()
        (folder / "m").write_text("new")
    stays = [path.name for path in (other, running, elsewhere, kept)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*stays, "data"])


def test_the_command_brings_the_old_folder_back_before_it_looks_at_it(folder: Path) -> None:
    run(spec(), Path("data"), report=silent)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    Path("data").replace(f".data.{os.uname().nodename}.{ended.pid}.old")
    with pytest.raises(SystemExit) as end:
        app(["run", "x.toml", "--extend", "data", "--out", "data"])
    assert end.value.code in (0, None) and folders(folder) == ["data"]


def test_a_link_to_a_folder_stays_one(folder: Path) -> None:
    run(spec(), Path("disk"), report=silent)
    Path("data").symlink_to("disk")
    run(spec(rows_per_shard=5), Path("data"), report=silent)
    assert Path("data").is_symlink() and up_to_date(spec(rows_per_shard=5), Path("disk"))
    assert folders(folder) == ["data", "disk"]
