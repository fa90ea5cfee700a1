"""Training as processes: killed and continued, alone and on two ranks, twice with one seed."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from etl.experiment_file import load
from etl.sources import read_raw_split
from recsys.experiment import Experiment
from tests.e2e.test_elastic import ranks_of

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
def test_evaluations_between_the_steps_of_two_ranks_change_no_number(data: Path, tmp_path: Path) -> None:
    """The ids of the next step already travel when an evaluation looks up its own rows."""
    settings = ("train.epochs=1", "train.log_every_steps=7")
    finish(data, tmp_path / "without", *settings, ranks=2)
    finish(data, tmp_path / "with", *settings, "train.eval_every_steps=10", "train.checkpoint_every_steps=4", ranks=2)
    lines = [
        map(json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines()) for run in ("with", "without")
    ]
    several, once = ({line["step"]: line for line in part} for part in lines)
    assert len(several) > len(once) > 5
    assert several[1]["loss"] == once[1]["loss"] and several[7]["loss"] == once[7]["loss"]
    last = max(once)
    assert {k: v for k, v in several[last].items() if "valid" in k} == {
        k: v for k, v in once[last].items() if "valid" in k
    }


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_learn_what_one_learns(data: Path, tmp_path: Path) -> None:
    one = finish(data, tmp_path / "one", "train.batch_size=512")
    two = finish(data, tmp_path / "two", "train.batch_size=256", ranks=2)
    assert first_loss(tmp_path / "one") == pytest.approx(first_loss(tmp_path / "two"), abs=1e-6)
    assert one["test"]["auc"] == pytest.approx(two["test"]["auc"], abs=0.002)
    assert one["test"]["auc"] > 0.92


@pytest.mark.slow
@pytest.mark.dist
def test_rows_of_a_table_on_two_ranks_learn_what_one_rank_learns(data: Path, tmp_path: Path) -> None:
    """The checkpoint of rows cut over two ranks is also read by one, which goes on to the same figures."""
    cut = ("embedding.sharding=row_wise", "train.epochs=1")
    whole = finish(data, tmp_path / "whole", "train.batch_size=512", *cut)
    two = finish(data, tmp_path / "two", "train.batch_size=256", *cut, ranks=2)
    assert first_loss(tmp_path / "whole") == pytest.approx(first_loss(tmp_path / "two"), abs=1e-6)
    assert two["test"]["auc"] == pytest.approx(whole["test"]["auc"], abs=1e-4)
    line = [sys.executable, "-m", "recsys", "evaluate", str(tmp_path / "two"), "--data", str(data), "--json"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["auc"] == pytest.approx(two["test"]["auc"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_one_seed_gives_one_result_also_after_a_kill(data: Path, tmp_path: Path, compiled: str) -> None:
    saving = ("train.checkpoint_every_steps=10", "model.keep_prob=0.8", f"train.compile={compiled}")
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


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_of_two_ranks_goes_on_alone_with_another_sharding(data: Path, tmp_path: Path) -> None:
    """And with the rows of its steps in two parts."""
    own = ("model.keep_prob=1.0", "embedding.optimizer=adagrad", "train.epochs=2")
    alone = finish(data, tmp_path / "alone", "train.batch_size=512", *own)
    saving = ("train.batch_size=256", "embedding.sharding=row_wise", "train.checkpoint_every_steps=5")
    run = tmp_path / "moved"
    process = subprocess.Popen(command(data, run, *own, *saving, ranks=2), cwd=ROOT, stderr=subprocess.DEVNULL)
    while not list((run / "checkpoints").glob("step-*/complete")) and process.poll() is None:
        time.sleep(0.01)
    ranks = ranks_of(process)
    process.kill()
    process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in ranks.values()):  # they end once they notice
        time.sleep(0.05)
    assert not (run / "result.json").exists(), "it ended before it was killed"
    line = command(data, run, *own, "train.batch_size=256", "train.accumulate=2", "embedding.sharding=column_wise")
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "embedding.sharding row_wise -> column_wise, train.accumulate 1 -> 2" in done.stderr
    moved = json.loads((run / "result.json").read_text())
    assert (moved["rows"], moved["steps"]) == (alone["rows"], alone["steps"])
    assert moved["test"]["auc"] == pytest.approx(alone["test"]["auc"], abs=1e-4)


@pytest.mark.slow
def test_raw_rows_are_predicted_as_the_test_split_was(data: Path, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "scores.parquet"
    finish(data, run, "train.epochs=1")
    spec = load(ROOT / "experiments" / "demo.toml", overrides=[], into=Experiment)
    wanted = pq.read_table(run / "predictions" / "test.parquet").slice(0, 500)
    raw = read_raw_split(spec, "test").slice(0, 500)
    pq.write_table(raw, tmp_path / "rows.parquet")
    line = [sys.executable, "-m", "recsys", "predict", str(run), "--input", str(tmp_path / "rows.parquet")]
    done = subprocess.run([*line, "--output", str(output)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    got = pq.read_table(output)["over_50k"].to_numpy()
    np.testing.assert_allclose(got, wanted["over_50k"].to_numpy(), rtol=0, atol=1e-6)


def test_a_terminal_shows_where_training_stands(data: Path, tmp_path: Path) -> None:
    """Step, loss, AUC, rows/s and time left, on a pseudo-terminal."""
    leader, follower = pty.openpty()
    line = command(data, tmp_path / "run", "train.epochs=2", "train.log_every_steps=5")
    wide = os.environ | {"COLUMNS": "140", "TERM": "xterm"}
    process = subprocess.Popen(line, cwd=ROOT, stderr=follower, stdout=subprocess.DEVNULL, env=wide)
    os.close(follower)
    shown = b""
    with contextlib.suppress(OSError):  # Linux ends a pseudo-terminal that nobody writes to with an error
        while part := os.read(leader, 4096):
            shown += part
    os.close(leader)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"step \d+, loss 0\.\d{4}, [\d,]+ rows/s, auc 0\.9\d{3} \d:\d\d:\d\d", text), text[-2000:]


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
