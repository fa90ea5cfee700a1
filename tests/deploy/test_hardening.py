"""What a server refuses by default, TLS, and that neither a kill nor a stop loses more than it must."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
import pytest
import tritonclient.grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from deploy.client import Client
from deploy.network import read_network
from deploy.server import ServerOptions, require_safe_bind
from etl.faults import Fault, Faults
from etl.sources import read_rows

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 120.0
BACK_S = {"stub": 5.0, "tritonserver": 10.0}
"""Until a killed process is replaced on an idle machine. Two thirds of it are imports of torch, which a busy machine
draws out as much as those of the first start: twice that bounds it there."""


@contextmanager
def serving(bundle: Path, *options: object) -> Iterator[tuple["subprocess.Popen[str]", Path]]:
    """A `deploy serve` that answers, and its state file."""
    state = bundle.parent / "server.json"
    line = [sys.executable, "-m", "deploy", "serve", str(bundle), *map(str, options)]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            end = time.monotonic() + WAIT_S
            while not state.is_file():
                assert server.poll() is None, server.stdout.read() if server.stdout else ""
                assert time.monotonic() < end, "no state file"
                time.sleep(0.05)
            yield server, state
        finally:
            server.terminate()
            server.wait(WAIT_S)


def address(state: Path) -> str:
    return f"127.0.0.1:{json.loads(state.read_text())['grpc_port']}"


def certificates(folder: Path) -> Path:
    """An authority, and one certificate of it for 127.0.0.1 that serves both sides."""
    folder.mkdir()
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1")
    for line in (
        "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.crt -days 2 -subj /CN=authority",
        "req -newkey rsa:2048 -nodes -keyout tls.key -out tls.csr -subj /CN=server",
        "x509 -req -in tls.csr -CA ca.crt -CAkey ca.key -CAcreateserial -out tls.crt -days 2 -extfile names",
    ):
        subprocess.run(["openssl", *line.split()], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize(
    ("host", "public", "fault"),
    [
        ("127.0.0.1", False, None),
        ("127.8.0.1", False, None),
        ("::1", False, None),
        ("0.0.0.0", True, None),
        ("0.0.0.0", False, "known holes"),
        ("::", False, "known holes"),
        ("10.1.2.3", False, "known holes"),
        ("localhost", True, "an IP address"),
    ],
)
def test_an_open_address_needs_a_word(tmp_path: Path, host: str, public: bool, fault: str | None) -> None:
    options = ServerOptions(repository=tmp_path, model="m", log_dir=tmp_path, host=host, public=public)
    if fault is None:
        require_safe_bind(options)
    else:
        with pytest.raises(Faults, match=fault):
            require_safe_bind(options)


def test_serve_refuses_an_open_address_and_missing_certificates_at_once(bundle: Path, tmp_path: Path) -> None:
    network = tmp_path / "network.toml"
    network.write_text('host = "0.0.0.0"\ntls = "certificates"\n')
    line = [sys.executable, "-m", "deploy", "serve", str(bundle), "--network", str(network)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, timeout=WAIT_S)
    assert done.returncode == 2
    assert "host: got 0.0.0.0" in done.stderr
    assert f"{tmp_path}/certificates/tls.crt: got no such file" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["hosts = 3", "i_know = 'perhaps'", "=", "tls = 3"])
def test_a_network_file_that_says_something_else_is_a_fault(tmp_path: Path, text: str) -> None:
    (tmp_path / "network.toml").write_text(text)
    with pytest.raises((Fault, Faults), match=r"network\.toml"):
        read_network(tmp_path / "network.toml")


@pytest.mark.triton
@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make certificates with")
@pytest.mark.parametrize("mutual", [False, True], ids=["tls", "mutual"])
def test_tls_is_asked_of_everyone_and_a_certificate_where_it_is_mutual(
    bundle: Path, tmp_path: Path, mutual: bool
) -> None:
    full = certificates(tmp_path / "full")
    server_side, bare = shutil.copytree(full, tmp_path / "server"), tmp_path / "bare"
    bare.mkdir()
    shutil.copy(full / "ca.crt", bare)
    if not mutual:
        (server_side / "ca.crt").unlink()
    (tmp_path / "network.toml").write_text('tls = "server"\n')
    with serving(bundle, "--network", tmp_path / "network.toml") as (_, state):
        assert json.loads(state.read_text())["tls"] is True
        with Client(address(state), tls=full) as client:
            assert client.tasks == ("click", "buy")
        if mutual:
            with pytest.raises(Fault):
                Client(address(state), tls=bare, deadline_s=3.0)
        else:
            Client(address(state), tls=bare).close()
        with pytest.raises(Fault):
            Client(address(state), deadline_s=3.0)


@pytest.mark.triton
def test_nobody_loads_unloads_or_uploads_a_model_without_the_key(bundle: Path) -> None:
    upload = {"file:1/model.py": b"import os\nos.mkdir('/tmp/uploaded')\n"}
    config = json.dumps({"name": "mine", "backend": "python", "max_batch_size": 1})
    with serving(bundle) as (_, state):
        key_file = Path(json.loads(state.read_text())["key_file"])
        assert key_file.stat().st_mode & 0o777 == 0o600
        before = {path: path.stat().st_mtime_ns for path in (bundle.parent / "repository").rglob("*")}
        client = triton_grpc.InferenceServerClient(address(state))
        for headers in (None, {"triton-grpc-protocol-admin": "0" * 32}):
            with pytest.raises(InferenceServerException, match="restricted"):
                client.load_model("mine", config=config, files=upload, headers=headers)
            with pytest.raises(InferenceServerException, match="restricted"):
                client.unload_model("ranker", headers=headers)
        client.close()
        connection = HTTPConnection("127.0.0.1", json.loads(state.read_text())["http_port"])
        connection.request("POST", "/v2/repository/models/ranker/unload", headers={"Connection": "close"})
        assert connection.getresponse().status == 403
        connection.close()
        Client(address(state)).close()
        after = {path: path.stat().st_mtime_ns for path in (bundle.parent / "repository").rglob("*")}
    assert not Path("/tmp/uploaded").exists()
    assert after == before, "the server wrote into its repository"
    assert not key_file.exists()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def pid_of(bundle: Path) -> int | None:
    """Of the server that answers now."""
    state = bundle.parent / "server" / "tritonserver.json"
    return int(json.loads(state.read_text())["pid"]) if state.is_file() else None


def scores(url: str, rows: pa.Table, *, wanted: npt.NDArray[np.float32]) -> bool:
    """A connection that failed is tried again after a pause, which others of this process share."""
    try:
        with Client(url, deadline_s=2.0) as client:
            return bool(abs(client.score(rows).score - wanted).max() < 1e-6)
    except Fault:
        return False


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.parametrize("victim", ["stub", "tritonserver"])
def test_a_process_killed_under_load_is_back_and_leaks_nothing(bundle: Path, victim: str) -> None:
    began = time.monotonic()
    with serving(bundle, "--instances", 2) as (_, state):
        started_s = time.monotonic() - began
        told = json.loads(state.read_text())
        with Client(address(state)) as client:
            rows = read_rows(bundle / "golden" / "requests.jsonl", client.columns)
            wanted = client.score(rows).score
        stop = threading.Event()

        def send() -> Counter[bool]:
            answers: Counter[bool] = Counter()
            with Client(address(state), deadline_s=2.0) as client:
                while not stop.is_set():
                    try:
                        answers[bool(abs(client.score(rows).score - wanted).max() < 1e-6)] += 1
                    except Fault:
                        time.sleep(0.02)
            return answers

        with ThreadPoolExecutor(max_workers=3) as threads:
            running = [threads.submit(send) for _ in range(3)]
            try:
                time.sleep(1)
                server = psutil.Process(told["pid"])
                (server if victim == "tritonserver" else server.children()[0]).kill()
                killed = time.monotonic()
                until(lambda: pid_of(bundle) not in (None, told["pid"]))
                until(lambda: scores(address(state), rows, wanted=wanted))
                back_s = time.monotonic() - killed
            finally:
                stop.set()
            answers = sum((each.result(WAIT_S) for each in running), Counter())
        assert set(answers) == {True}, "a wrong score"
        assert back_s < max(BACK_S[victim], 2 * started_s), f"{started_s:.1f} s from a cold start on this machine"
        regions = list(Path("/dev/shm").glob(f"{told['server_id']}*"))
        assert len(regions) == 2, "those of the new stubs alone"
    assert not list(Path("/dev/shm").glob(f"{told['server_id']}*"))


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.usefixtures("one_try")
def test_a_stop_under_load_answers_all_that_was_accepted_though_a_connection_idles(bundle: Path) -> None:
    """A request is answered, or refused as a whole; none is lost on the way."""
    with serving(bundle) as (server, state):
        told = json.loads(state.read_text())
        idle = HTTPConnection("127.0.0.1", told["http_port"])
        idle.request("GET", "/v2/health/live")
        idle.getresponse().read()

        def send() -> tuple[int, str]:
            answered = 0
            with Client(address(state), deadline_s=5.0) as client:
                rows = read_rows(bundle / "golden" / "requests.jsonl", client.columns)
                while True:
                    try:
                        client.score(rows)
                        answered += 1
                    except Fault as refusal:
                        return answered, str(refusal)

        with ThreadPoolExecutor(max_workers=6) as threads:
            running = [threads.submit(send) for _ in range(6)]
            time.sleep(2)
            os.kill(server.pid, signal.SIGTERM)
            ends = [each.result(WAIT_S) for each in running]
        assert server.wait(WAIT_S) == 0
        idle.close()
    assert all(answered > 0 for answered, _ in ends)
    lost = [end for _, end in ends if not any(word in end.lower() for word in REFUSALS)]
    assert not lost
    assert not list(Path("/dev/shm").glob(f"{told['server_id']}*"))


REFUSALS = ("unavailable", "shutting down", "not found", "not ready", "refused", "server is stopping", "unknown model")
