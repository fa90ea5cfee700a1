"""A bundle is whole, says what it holds, and is refused where it would score otherwise than the run."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from deploy import export as exporting
from deploy.bundle import read_bundle
from deploy.program import Precision, ServedNetwork
from etl.faults import Fault
from recsys.network import Network


def test_the_manifest_names_every_file_and_figure(exported: Path, run_folder: Path) -> None:
    bundle = read_bundle(exported)
    names = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert set(bundle.files) == names - {"bundle.json"}
    assert {
        "weights.safetensors",
        "program.pt2",
        "program.json",
        "served_program.py",
        "schema.json",
        "model.py",
        "golden/requests.jsonl",
    } <= names
    assert not [name for name in names if name.endswith((".pkl", ".pt", ".pickle"))]
    assert bundle.run == str(run_folder)
    assert set(bundle.versions) == {"rankforge", "torch", "numpy", "python"}
    result = json.loads((run_folder / "result.json").read_text())
    assert bundle.metrics["test"]["click/auc"] == result["test"]["click/auc"]


def test_golden_requests_hold_missing_unseen_and_extreme_values(exported: Path) -> None:
    lines = [json.loads(line) for line in (exported / "golden/requests.jsonl").read_text().splitlines()]
    assert len(lines) == 10 + 4
    assert dict.fromkeys(["site", "city", "item", "age", "price"]) in lines
    assert lines[12]["item"] == 2**63 - 1
    scores = pq.read_table(exported / "golden/scores.parquet")
    assert scores["ids"][10].as_py() == [0, 0, 0, 0, 0]
    assert all(0 <= score <= 1 for task in ("click", "buy") for score in scores[task].to_pylist())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # the commands silence it themselves
def test_a_program_that_scores_otherwise_is_refused(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = exporting.served_network

    def nudged(network: Network, precision: Precision) -> ServedNetwork:
        served = made(network, precision)
        if served.weights is not None:
            served.weights.matrix_RW += 1e-4
        return served

    monkeypatch.setattr(exporting, "served_network", nudged)
    with pytest.raises(Fault, match="scores that differ by"):
        exporting.export(run_folder, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_result_is_refused(run_folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run_folder, tmp_path / "run")
    (run / "result.json").unlink()
    with pytest.raises(Fault, match="finish the training"):
        exporting.export(run, tmp_path / "bundle")
