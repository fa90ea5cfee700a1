"""Training as processes: killed and continued, alone and on two ranks, twice with one seed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXPERIMENT = str(ROOT / "experiments" / "demo.toml")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("etl") / "data"
    done = subprocess.run([sys.executable, "-m", "etl", "run", EXPERIMENT, "--out", str(folder)], cwd=ROOT, check=False)
    assert done.returncode == 0
    return folder


def command(data: Path, run: Path, *settings: str, ranks: int = 1) -> list[str]:
    start = ["-m"] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    sets = [part for setting in ("train.epochs=3", *settings) for part in ("--set", setting)]
    where = ["--data", str(data), "--run-dir", str(run)]
    return [sys.executable, *start, "recsys", "train", EXPERIMENT, *where, *sets]


def finish(data: Path, run: Path, *settings: str, ranks: int = 1) -> dict[str, dict[str, float]]:
    line = command(data, run, *settings, ranks=ranks)
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((run / "result.json").read_text())


def first_loss(run: Path) -> float:
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert line["step"] == 1
    return line["loss"]


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_learn_what_one_learns(data: Path, tmp_path: Path) -> None:
    one = finish(data, tmp_path / "one", "train.batch_size=512")
    two = finish(data, tmp_path / "two", "train.batch_size=256", ranks=2)
    assert first_loss(tmp_path / "one") == pytest.approx(first_loss(tmp_path / "two"), abs=1e-6)
    assert one["test"]["auc"] == pytest.approx(two["test"]["auc"], abs=0.002)
    assert one["test"]["auc"] > 0.92


@pytest.mark.slow
def test_one_seed_gives_one_result_also_after_a_kill(data: Path, tmp_path: Path) -> None:
    saving = ("train.checkpoint_every_steps=10", "model.keep_prob=0.8")
    whole = finish(data, tmp_path / "whole", *saving)
    run = tmp_path / "killed"
    process = subprocess.Popen(command(data, run, *saving), cwd=ROOT, stderr=subprocess.DEVNULL, env=os.environ)
    while not list((run / "checkpoints").glob("step-*/complete")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "result.json").exists(), "it ended before it was killed"
    again = finish(data, run, *saving)
    assert (again["valid"], again["test"], again["steps"]) == (whole["valid"], whole["test"], whole["steps"])
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_a_run_folder_of_another_experiment_is_refused(data: Path, tmp_path: Path) -> None:
    finish(data, tmp_path / "run", "train.epochs=1")
    line = command(data, tmp_path / "run", "train.batch_size=64")
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "train.batch_size" in done.stderr and "Traceback" not in done.stderr


def test_stale_data_and_batch_size_0_are_refused(data: Path, tmp_path: Path) -> None:
    for setting, wanted in (("data.split.seed=9", "another feature spec"), ("train.batch_size=0", "train.batch_size")):
        line = command(data, tmp_path / "none", setting)
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and wanted in done.stderr, done.stderr
        assert not (tmp_path / "none").exists()
