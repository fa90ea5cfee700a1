"""`deploy bench` on a real server: every side with its figures, as a table, as JSON and as a plot."""

import json
import shutil
from pathlib import Path

import pytest

from deploy.bench import Load, load_server, requests_of
from deploy.bench_bundle import packed_rows
from deploy.bundle import MODEL, read_bundle
from etl.faults import Fault
from tests.deploy.test_hardening import certificates
from tests.deploy.test_serving import deploy, serving


@pytest.mark.slow
@pytest.mark.triton
def test_a_bundle_beside_an_empty_model_and_eager_scoring(bundle: Path, tmp_path: Path) -> None:
    done = deploy("bench", bundle, "--rows", 4, "--concurrency", 2, "--out", tmp_path / "bench")
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "bench" / "bench.json").read_text())
    assert (written["rows"], written["load"]["clients"], written["load"]["rate"]) == (4, 2, None)
    assert [side["side"] for side in written["sides"]] == ["served", "echo", "eager in process"]
    for side in written["sides"]:
        assert side["failed"] == 0 and side["requests"] > 0 and side["cpu_us_per_row"] > 0
        assert 0 < side["p50_ms"] <= side["p95_ms"] <= side["p99_ms"]
        assert f"{side['side']:18}{side['rows_per_s']:10,.0f}" in done.stdout
    assert "<svg" in (tmp_path / "bench" / "bench.svg").read_text()


@pytest.mark.slow
@pytest.mark.triton
def test_an_open_loop_sends_at_its_rate_and_a_server_alone_will_do(bundle: Path, tmp_path: Path) -> None:
    with serving(bundle) as (_, url):
        done = deploy("bench", "--url", url, "--rows", 2, "--rate", 20, "--out", tmp_path / "bench")
        requests = requests_of(packed_rows(bundle, read_bundle(bundle)), "nobody", rows=2)
        with pytest.raises(Fault, match="nobody"):
            load_server(url, requests, rows=2, load=Load(1, seconds=0.1), side=MODEL, pid=None)
    assert done.returncode == 0, done.stdout + done.stderr
    (side,) = json.loads((tmp_path / "bench" / "bench.json").read_text())["sides"]
    assert (side["failed"], side["cpu_us_per_row"]) == (0, None)
    assert 40 <= side["requests"] <= 130, "80 of a random process in four seconds"
    assert "2 rows a request, 20 requests/s" in done.stdout


@pytest.mark.slow
@pytest.mark.triton
def test_the_candidates_of_a_user(bundle: Path, tmp_path: Path) -> None:
    done = deploy("bench", bundle, "--ranked", "--rows", 20, "--concurrency", 2, "--out", tmp_path / "bench")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 candidates a request, 2 clients" in done.stdout
    written = json.loads((tmp_path / "bench" / "bench.json").read_text())
    assert (written["rows"], written["ranked"]) == (20, True)
    assert [side["side"] for side in written["sides"]] == ["served", "echo", "eager in process"]
    assert all(side["failed"] == 0 and side["requests"] > 0 for side in written["sides"])


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make certificates with")
def test_a_server_that_asks_for_certificates(bundle: Path, tmp_path: Path) -> None:
    own = certificates(tmp_path / "certificates")
    (tmp_path / "network.toml").write_text('tls = "certificates"\n')
    with serving(bundle, "--network", tmp_path / "network.toml") as (_, url):
        done = deploy(
            "bench", "--url", url, "--tls", own, "--ranked", "--rows", 20, "--rate", 20, "--out", tmp_path / "b"
        )
        refused = deploy("bench", "--url", url, "--rows", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    (side,) = json.loads((tmp_path / "b" / "bench.json").read_text())["sides"]
    assert side["failed"] == 0 and side["requests"] > 0
    assert refused.returncode == 2, refused.stdout + refused.stderr


def test_either_a_bundle_or_a_server() -> None:
    done = deploy("bench")
    assert done.returncode == 2
    assert "wanted either of the two" in done.stderr
    done = deploy("bench", "bundle", "--tls", "certificates")
    assert done.returncode == 2
    assert "got --tls with a bundle" in done.stderr
