"""The commands against a real server: what is served equals what was trained, and the user's faults exit with 2."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tritonclient.grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from deploy.client import Client
from etl.artifact import sha256
from etl.faults import Fault
from etl.sources import read_rows

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 120.0


def deploy(*arguments: object) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-m", "deploy", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, timeout=WAIT_S)


@contextmanager
def serving(bundle: Path, *options: object) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A `deploy serve` that answers, and its gRPC address."""
    state = bundle.parent / "server.json"
    line = [sys.executable, "-m", "deploy", "serve", str(bundle), *map(str, options)]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            end = time.monotonic() + WAIT_S
            while not state.is_file():
                assert server.poll() is None, server.stdout.read() if server.stdout else ""
                assert time.monotonic() < end, "no state file"
                time.sleep(0.05)
            yield server, f"127.0.0.1:{json.loads(state.read_text())['grpc_port']}"
        finally:
            server.terminate()
            server.wait(WAIT_S)


@pytest.fixture(scope="module")
def home(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "home"
    shutil.copytree(exported, folder / "bundle")
    return folder


@pytest.fixture(scope="module")
def url(home: Path) -> Iterator[str]:
    with serving(home / "bundle", "--instances", 2) as (_, address):
        yield address


@pytest.fixture
def rows(home: Path, url: str) -> pa.Table:
    with Client(url) as client:
        return read_rows(home / "bundle" / "golden" / "requests.jsonl", client.columns)


@pytest.mark.triton
def test_verify_finds_every_row_equal(home: Path, url: str) -> None:
    done = deploy("verify", home / "bundle", "--url", url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "golden requests: 14 of 14 rows equal within 1e-06" in done.stdout
    assert "golden rankings: 14 of 14 rows equal within 1e-06" in done.stdout
    assert "test split: 150 of 150 rows equal within 1e-06" in done.stdout


@pytest.mark.triton
@pytest.mark.parametrize("column", ["click", "ids"])
def test_verify_exits_1_where_a_row_differs(url: str, bundle: Path, column: str) -> None:
    scores = bundle / "golden" / "scores.parquet"
    table = pq.read_table(scores)
    kept = table[column].to_pylist()
    kept[3] = kept[3] + 2e-6 if column == "click" else [kept[3][0] + 1, *kept[3][1:]]
    at = table.schema.get_field_index(column)
    pq.write_table(table.set_column(at, column, pa.array(kept, table.schema.field(column).type)), scores)
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["files"]["golden/scores.parquet"] = sha256(scores)
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    done = deploy("verify", bundle, "--url", url)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "golden requests: 13 of 14 rows equal" in done.stdout
    assert "golden rankings: 13 of 14 rows equal" in done.stdout
    assert "test split: 150 of 150 rows equal" in done.stdout


@pytest.mark.triton
def test_score_writes_a_column_a_task(home: Path, url: str, tmp_path: Path) -> None:
    requests = home / "bundle" / "golden" / "requests.jsonl"
    done = deploy("score", "--url", url, "--input", requests, "--output", tmp_path / "scores.parquet")
    assert done.returncode == 0, done.stderr
    got, wanted = pq.read_table(tmp_path / "scores.parquet"), pq.read_table(home / "bundle/golden/scores.parquet")
    assert got.column_names == ["click", "buy"]
    for task in got.column_names:
        np.testing.assert_allclose(got[task].to_numpy(), wanted[task].to_numpy(), rtol=0, atol=1e-6)


@pytest.mark.triton
def test_rows_beyond_one_batch_come_back_in_order(url: str, rows: pa.Table) -> None:
    many = pa.concat_tables([rows] * 30)
    assert many.num_rows > 12 * 32
    with Client(url) as client:
        once, often = client.score(rows, ids=True), client.score(many, ids=True)
        assert client.score(rows.slice(0, 0)).score.shape == (0, 2)
    np.testing.assert_allclose(often.score, np.tile(once.score, (30, 1)), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(often.ids, np.tile(once.ids, (30, 1)))
    assert np.ptp(once.score[:, 0]) > 1e-4


@pytest.mark.triton
def test_dicts_score_as_the_table_does(url: str, rows: pa.Table) -> None:
    with Client(url) as client:
        np.testing.assert_array_equal(client.score(rows.to_pylist()).score, client.score(rows).score)


@pytest.mark.triton
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": ["red"]}, "unknown column 'colour'"),
        ({"price": [float("inf")]}, "column 'price' holds inf"),
        ({"item": [1.5]}, "column 'item' holds double, wanted int64"),
        ({"site": None}, "column 'site' is missing"),
        ({"price": [1e300]}, "leaves the range of float32"),
    ],
)
def test_rows_that_the_model_does_not_take(
    url: str, rows: pa.Table, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    columns = {**rows.slice(0, 1).to_pydict(), **change}
    table = pa.table({name: values for name, values in columns.items() if values is not None})
    with Client(url) as client, pytest.raises(Fault, match=message):
        client.score(table)
    pq.write_table(table, tmp_path / "bad.parquet")
    done = deploy("score", "--url", url, "--input", tmp_path / "bad.parquet", "--output", tmp_path / "scores.parquet")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "scores.parquet").exists()


@pytest.mark.triton
def test_verify_of_rows_that_cannot_be_packed_exits_2(home: Path, url: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"colour": ["red"]}), tmp_path / "bad.parquet")
    done = deploy("verify", home / "bundle", "--url", url, "--input", tmp_path / "bad.parquet")
    assert done.returncode == 2
    assert "unknown column 'colour'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.triton
def test_a_foreign_clients_bad_request_fails_alone(url: str) -> None:
    """Sent past our client, which would refuse it; a third of the requests, all in flight together."""
    server = triton_grpc.InferenceServerClient(url)
    prices = [[np.nan, np.inf, 1e300][at % 3] if at % 3 == 1 else 5.0 for at in range(90)]
    futures: list[Future[Any]] = [_send(server, price=price) for price in prices]
    scores = []
    for price, future in zip(prices, futures, strict=True):
        if price == 5.0:
            scores.append(future.result(WAIT_S).as_numpy("score"))
            continue
        with pytest.raises(InferenceServerException, match="price") as caught:
            future.result(WAIT_S)
        assert str(caught.value.status()).endswith("INVALID_ARGUMENT")
    server.close()
    assert len(scores) == 60
    np.testing.assert_allclose(np.concatenate(scores), np.tile(scores[0], (60, 1)), rtol=0, atol=1e-6)


def _send(server: triton_grpc.InferenceServerClient, *, price: float) -> "Future[Any]":
    future: Future[Any] = Future()

    def done(result: Any, error: InferenceServerException | None) -> None:
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    keys, numbers = triton_grpc.InferInput("keys", [1, 3], "INT64"), triton_grpc.InferInput("numbers", [1, 2], "FP64")
    keys.set_data_from_numpy(np.full((1, 3), -1, np.int64))
    numbers.set_data_from_numpy(np.array([[30.0, price]]))
    server.async_infer("ranker", [keys, numbers], callback=done)
    return future


@pytest.mark.triton
def test_only_what_is_asked_for_is_sent(url: str) -> None:
    keys, numbers = triton_grpc.InferInput("keys", [1, 3], "INT64"), triton_grpc.InferInput("numbers", [1, 2], "FP64")
    keys.set_data_from_numpy(np.zeros((1, 3), np.int64))
    numbers.set_data_from_numpy(np.zeros((1, 2)))
    server = triton_grpc.InferenceServerClient(url)
    for names in (["score"], ["score", "floats", "ids"]):
        asked = [triton_grpc.InferRequestedOutput(name) for name in names]
        answer = server.infer("ranker", [keys, numbers], outputs=asked).get_response()
        assert {output.name for output in answer.outputs} == set(names)
    server.close()


@pytest.mark.triton
def test_a_second_server_from_the_same_folder_is_refused_and_the_first_goes_on(home: Path, url: str) -> None:
    before = (home / "server.json").read_text()
    done = deploy("serve", home / "bundle")
    assert done.returncode == 2
    assert "a server runs from it" in done.stderr
    assert (home / "server.json").read_text() == before
    assert deploy("verify", home / "bundle", "--url", url).returncode == 0


@pytest.mark.triton
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_server_leaves_no_process_and_no_state(bundle: Path, number: signal.Signals) -> None:
    with serving(bundle) as (server, url):
        pid = json.loads((bundle.parent / "server.json").read_text())["pid"]
        os.kill(server.pid, number)
        assert server.wait(WAIT_S) == 0
        assert not Path(f"/proc/{pid}").exists()
        assert not (bundle.parent / "server.json").exists()
        with pytest.raises(Fault, match="a server that serves this model"):
            Client(url, deadline_s=2.0)


@pytest.mark.triton
@pytest.mark.parametrize("option", ["--grpc-port", "--http-port"])
def test_a_port_in_use_exits_2(bundle: Path, option: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = deploy("serve", bundle, option, port)
    assert done.returncode == 2
    assert f"port {port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_that_is_not_there_exits_2(bundle: Path, tmp_path: Path) -> None:
    done = deploy("score", "--url", "127.0.0.1:9", "--input", "x.jsonl", "--output", tmp_path / "x.parquet")
    assert done.returncode == 2
    assert "127.0.0.1:9: model 'ranker'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_changed_bundle_is_not_served(bundle: Path) -> None:
    (bundle / "model.py").write_text("import os")
    done = deploy("serve", bundle)
    assert done.returncode == 2
    assert "model.py: got sha256" in done.stderr


@pytest.mark.parametrize("arguments", [("serve", "nowhere/bundle"), ("export", "nowhere/run")])
def test_a_folder_that_is_not_there_exits_2(arguments: tuple[str, str]) -> None:
    done = deploy(*arguments)
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr
