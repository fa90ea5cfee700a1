"""A bundle is whole, says what it holds, and is refused where it would score otherwise than the run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from deploy import export as exporting
from deploy.bundle import Cost, read_bundle
from deploy.lookup import Split
from deploy.precision import PRECISIONS, accepted, cost_lines
from deploy.program import FULL, Precision, ServedNetwork
from etl.faults import Fault, Faults
from etl.pack import pack
from etl.sources import read_rows
from etl.transform import Transform
from recsys.experiment import Export
from recsys.network import Network
from tests.deploy.conftest import ROOT


def test_the_manifest_names_every_file_and_figure(exported: Path, run_folder: Path) -> None:
    bundle = read_bundle(exported)
    names = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert set(bundle.files) == names - {"bundle.json"}
    assert {
        "weights.safetensors",
        "program.pt2",
        "ranking.pt2",
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
@pytest.mark.parametrize("side", ["rows", "user"])
def test_a_program_that_scores_otherwise_is_refused(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    """Also where it is that of ranking requests alone."""
    made = exporting.served_network

    def mistaken(network: Network, precision: Precision = FULL, *, split: Split | None = None) -> ServedNetwork:
        served = made(network, precision, split=split)
        served.get_submodule(f"reader.{side}.lookups.0").single_begin_L.zero_()
        return served

    monkeypatch.setattr(exporting, "served_network", mistaken)
    monkeypatch.setattr(exporting, "level_of", lambda wanted: None)
    with pytest.raises(Fault, match="scores that differ by"):
        exporting.export(run_folder, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_transforms_of_a_bundle_share_mapped_vocabularies(bundle: Path) -> None:
    """Nothing to build, no copy an instance, and the ids of the vocabularies that were fitted."""
    one, two = (Transform.mapped(bundle / "transform") for _ in range(2))
    built = Transform.load(bundle / "transform")
    assert set(one.vocabularies) == {"site", "city", "item"}
    for name in one.vocabularies:
        path = bundle / "transform" / "vocabulary" / f"{name}.npy"
        mappings = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
        assert len(mappings) >= 2 and all(" r--" in line for line in mappings), "each maps the file, none may write"
    rows = read_rows(bundle / "golden" / "requests.jsonl", one.signature.columns)
    packed = pack(rows, one.signature)
    wanted = built.apply(packed).ids
    assert (wanted > 0).any(axis=0).all()
    for each in (one, two):
        assert each.apply(packed).ids.tolist() == wanted.tolist()


def test_a_cut_vocabulary_is_refused_by_name(bundle: Path) -> None:
    path = bundle / "transform" / "vocabulary" / "item.npy"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(Faults, match=r"item\.npy"):
        read_bundle(bundle)
    with pytest.raises(ValueError, match=r"item\.npy.*copy the bundle anew"):
        Transform.mapped(bundle / "transform")


def test_a_run_without_result_is_refused(run_folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run_folder, tmp_path / "run")
    (run / "result.json").unlink()
    with pytest.raises(Fault, match="finish the training"):
        exporting.export(run, tmp_path / "bundle")


def test_the_manifest_says_what_each_precision_costs(exported: Path) -> None:
    bundle = read_bundle(exported)
    assert [(cost.tables, cost.dense) for cost in bundle.costs] == [precision[:2] for precision in PRECISIONS]
    exact, lower = bundle.costs[0], bundle.costs[1:]
    assert exact.difference == 0
    assert exact.auc["click"] == pytest.approx(bundle.metrics["valid"]["click/auc"], abs=1e-6)
    assert exact.ne["buy"] == pytest.approx(bundle.metrics["valid"]["buy/ne"], abs=1e-6)
    assert all(0 < cost.difference < 0.01 and cost.rows == exact.rows for cost in lower)
    assert bundle.costs[2].size_bytes < exact.size_bytes
    lines = cost_lines(bundle.costs)  # what `export` prints
    assert [tuple(line.split()[:2]) for line in lines[1:-1]] == [precision[:2] for precision in PRECISIONS]
    assert f"{exact.auc['click']:.5f}" in lines[1] and f"{exact.ne['click']:.5f}" in lines[1]
    assert lines[-1] == f"of task 'click', on {exact.rows:,} validation rows"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_lower_precision_needs_validation_rows(run_folder: Path, tmp_path: Path) -> None:
    int8 = {"tables": "int8", "compile": "off", "auc_budget": 0.05, "ne_budget": 0.05}  # of some 100 rows
    bundle = exporting.export(run_folder, tmp_path / "bundle", overrides=int8)
    assert (bundle.quantization, bundle.tolerance) == ("tables int8, dense fp32", 1e-3)
    assert bundle.isa == "any: no native code"
    with pytest.raises(Fault, match="no validation rows"):
        exporting.export(run_folder, tmp_path / "other", data=tmp_path, overrides=int8)
    plain = exporting.export(run_folder, tmp_path / "other", data=tmp_path, overrides={"compile": "off"})
    assert plain.costs == ()
    assert cost_lines(plain.costs) == [
        "no dataset folder: costs of precisions are not known, nor is the drift of values when it serves"
    ]
    assert json.loads((tmp_path / "other" / "reference.json").read_text())["numbers"] == {}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_numbers_of_32_bits_need_raw_rows_that_hold_them(run_folder: Path, tmp_path: Path) -> None:
    """What the client would refuse to send is not exported: it could never be tried on its golden rows."""
    run = shutil.copytree(run_folder, tmp_path / "run")
    experiment = json.loads((run / "experiment.json").read_text())
    experiment["serve"]["numbers"] = "fp32"
    (run / "experiment.json").write_text(json.dumps(experiment))
    with pytest.raises(Fault, match=r"serve\.numbers.*column 'price' holds .* which is no float32"):
        exporting.export(run, tmp_path / "bundle", overrides={"compile": "off"})
    assert not (tmp_path / "bundle").exists()


def test_an_export_beyond_its_budget_shows_the_costs_and_writes_nothing(run_folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run_folder, tmp_path / "run")
    experiment = json.loads((run / "experiment.json").read_text())
    experiment["export"] |= {"auc_budget": 1.0, "ne_budget": 0.0}
    (run / "experiment.json").write_text(json.dumps(experiment))
    line = [sys.executable, "-m", "deploy", "export", run, "--out", tmp_path / "bundle", "--tables", "int8"]
    line += ["--data", run_folder.parent / "data", "--compile", "off"]
    done = subprocess.run([*map(str, line)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "raise export.ne_budget knowingly" in done.stderr
    assert "Traceback" not in done.stderr
    heading, *figures = done.stdout.splitlines()
    assert heading.split()[:5] == ["tables", "dense", "MB", "AUC", "NE"]
    assert [tuple(each.split()[:2]) for each in figures[:-1]] == [precision[:2] for precision in PRECISIONS]
    assert not (tmp_path / "bundle").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_dataset_that_is_named_is_the_reference_of_drift(run_folder: Path, exported: Path, tmp_path: Path) -> None:
    run, beside = shutil.copytree(run_folder, tmp_path / "run"), tmp_path / "data"
    (beside / "valid").mkdir(parents=True)
    manifest = json.loads((run_folder.parent / "data" / "manifest.json").read_text())
    (beside / "manifest.json").write_text(json.dumps(manifest | {"hash": "0" * 64}))
    with pytest.raises(Fault, match=r"manifest\.json: got data of another feature spec"):
        exporting.export(run, tmp_path / "bundle", overrides={"compile": "off"})
    exporting.export(run, tmp_path / "bundle", data=run_folder.parent / "data", overrides={"compile": "off"})
    found, wanted = (json.loads((folder / "reference.json").read_text()) for folder in (tmp_path / "bundle", exported))
    assert found == wanted
    assert set(found["features"]) >= {"site", "item"}
    assert set(found["numbers"]) == {"age", "price"}
    assert {sum(bins["counts"]) for bins in found["numbers"].values()} == {manifest["splits"]["valid"]["rows"]}


@pytest.mark.parametrize("metric", ["auc", "ne"])
@pytest.mark.parametrize("change", [-0.002, 0.002])
def test_a_precision_that_moves_a_metric_is_refused(metric: str, change: float) -> None:
    figures = {"auc": {"a": None, "b": 0.7}, "ne": {"a": None, "b": 0.9}}
    finer = {"finer": "fp16", "kept": ("deep.layers.0",)}
    exact = Cost(tables="fp32", dense="fp32", size_bytes=8, rows=9, difference=0, **figures)
    moved = figures | {metric: {"a": None, "b": figures[metric]["b"] + change}}
    int8 = Cost(tables="int8", dense="bf16", **finer, size_bytes=2, rows=9, difference=0.01, **moved)
    budget = Export(auc_budget=0.001, ne_budget=0.001)
    with pytest.raises(Fault, match=f"{metric} .* of task 'b'"):
        accepted([exact, int8], PRECISIONS[4], budget=budget)
    assert accepted([exact, int8], PRECISIONS[0], budget=budget) == Precision()
    found = accepted([exact, int8], PRECISIONS[4], budget=Export(auc_budget=0.003, ne_budget=0.003))
    assert found == Precision("fp16", "bf16", ("deep.layers.0",))
    assert cost_lines([exact, int8])[2].endswith("1.0e-02  tables fp16, deep.layers.0")
