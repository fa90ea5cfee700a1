"""Raw test rows of public data, served, against offline scores: ids exactly, probabilities within 1e-6."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.deploy.conftest import ROOT, command
from tests.deploy.test_serving import deploy, serving

DATA = Path(os.environ.get("RANKFORGE_DATA", ROOT.parent / "shared" / "data"))
SHORT = ["train.epochs=1", "serve.max_batch_size=512"]


def served_equals_offline(experiment: str, settings: list[str], *, folder: Path) -> int:
    """Trains for one epoch, exports, serves and verifies; returns how many test rows were compared."""
    options = [part for setting in [*settings, *SHORT] for part in ("--set", setting)]
    path = ROOT / "experiments" / experiment
    command("etl", "run", path, "--out", folder / "data", *options)
    command("recsys", "train", path, "--data", folder / "data", "--run", folder / "run", *options)
    command("deploy", "export", folder / "run", "--out", folder / "bundle")
    with serving(folder / "bundle") as (_, url):
        done = deploy("verify", folder / "bundle", "--url", url)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"test split: ([\d,]+) of \1 rows equal within 1e-06", done.stdout)
    assert found, done.stdout
    return int(found[1].replace(",", ""))


@pytest.mark.slow
@pytest.mark.triton
def test_adult(tmp_path: Path) -> None:
    user = json.dumps(["age", "sex", "race", "native_country", "education"])
    assert served_equals_offline("demo.toml", [f"serve.user={user}"], folder=tmp_path) == 16_281


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.skipif(not (DATA / "frappe").is_dir(), reason=f"no Frappe in {DATA}: set RANKFORGE_DATA to its folder")
def test_frappe(tmp_path: Path) -> None:
    files = [f'data.{split}=["{DATA / "frappe" / split}.csv.gz"]' for split in ("train", "valid", "test")]
    rows = served_equals_offline("frappe/deepfm.toml", [*files, 'serve.user=["user"]'], folder=tmp_path)
    assert rows > 20_000


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.skipif(
    not (DATA / "amazon_beauty").is_dir(), reason=f"no Amazon Beauty in {DATA}: set RANKFORGE_DATA to its folder"
)
def test_amazon_beauty(tmp_path: Path) -> None:
    """A history of 50 items with their categories; some thousands of the rows train, and as many are compared."""
    line = [sys.executable, "scripts/beauty.py", DATA / "amazon_beauty", tmp_path]
    subprocess.run(line, cwd=ROOT, check=True, capture_output=True)
    for split, rows in (("train", 20_000), ("valid", 2_000), ("test", 6_000)):
        path = tmp_path / f"{split}.parquet"
        pq.write_table(pq.read_table(path).slice(0, rows), path)
    files = [f'data.{split}=["{tmp_path / split}.parquet"]' for split in ("train", "valid", "test")]
    user = 'serve.user=["history", "history_category"]'
    assert served_equals_offline("beauty/din.toml", [*files, user], folder=tmp_path) == 6_000
