"""Training by more ranks than there are rows, one of the files being empty: nobody waits, and each row is learned from
as often as alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from recsys.checkpoint import latest
from recsys.parallel.state import read_tensors
from recsys.progress import quiet_libraries
from tests.e2e.test_ranks import ROOT, toml, train_command
from tests.recsys.conftest import RAW, write_dataset

pytestmark = [pytest.mark.slow, pytest.mark.dist]
ROWS, EPOCHS = 3, 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three rows of each split, in the first of two files."""
    write_dataset(tmp_path / "data")
    for split in ("train", "valid", "test"):
        for name, rows in (("part-0.parquet", ROWS), ("part-1.parquet", 0)):
            path = tmp_path / "data" / split / name
            table = pq.read_table(path).sort_by("click")  # of both labels
            pq.write_table(table.take([0, 1, len(table) - 1]).slice(0, rows), path)
    return tmp_path


def trained(folder: Path, *, ranks: int, sharding: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The result, and all weights and states, of a run of so many ranks."""
    name = f"{sharding}-{ranks}"
    sections = RAW | {
        "train": RAW["train"] | {"batch_size": 8 // ranks, "epochs": EPOCHS, "dead_after_s": 30.0},
        "embedding": RAW["embedding"] | {"sharding": sharding},
        "model": RAW["model"] | {"keep_prob": 1.0},
    }
    (folder / "known.toml").write_text("".join(f"{key} = {toml(value)}\n" for key, value in sections.items()))
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    line = [sys.executable, *start, *train_command(folder, name)[1:]]
    own = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=ROOT, env=own, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    newest = latest(folder / name)
    assert newest and newest[1].finished
    return json.loads((folder / name / "result.json").read_text()), read_tensors(newest[0])


def test_ranks_without_rows_train_with_the_others(folder: Path) -> None:
    quiet_libraries()
    alone, wanted = trained(folder, ranks=1, sharding="table_wise")
    several, found = trained(folder, ranks=4, sharding="row_wise")
    assert several["rows"] == alone["rows"] == ROWS * EPOCHS
    assert several["steps"] == alone["steps"] == EPOCHS
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)
    assert several["test"]["logloss"] == pytest.approx(alone["test"]["logloss"], abs=1e-6)
