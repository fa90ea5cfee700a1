"""The embedded server: what needs no Triton first, then a real one with a tiny Python model."""

import dataclasses
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from importlib import metadata
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from deploy.server import EmbeddedServer, Endpoint, ServerOptions, embedded, runtime
from deploy.server.folder import log_folder
from deploy.server.log import reasons
from deploy.server.ports import Ports
from etl.faults import Fault, Faults

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 60.0

CONFIG = """
name: "double"
backend: "python"
max_batch_size: 8
input [{ name: "x" data_type: TYPE_INT64 dims: [1] }]
output [{ name: "y" data_type: TYPE_INT64 dims: [1] }]
instance_group [{ count: 2 kind: KIND_CPU }]
parameters { key: "signature" value { string_value: "x -> y" } }
"""

DOUBLE = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", 2 * x)]) for x in inputs]
"""

BROKEN = """
class TritonPythonModel:
    def initialize(self, args):
        raise ValueError("weights.bin holds 3 tables, wanted 26")
"""

CRASHING = """
import os

class TritonPythonModel:
    def initialize(self, args):
        os.write(2, b"illegal instruction in weights.so")
        os.abort()
"""

SLOW = """
import os, time

class TritonPythonModel:
    def initialize(self, args):
        os.write(2, b"slow model begins")
        time.sleep(600)
"""

SLOW_TO_ANSWER = f"""
import os, time
{DOUBLE}
    def initialize(self, args):
        self._at_once = self.execute
        self.execute = self._later

    def _later(self, requests):
        os.write(2, b"request arrived")
        time.sleep(2)
        return self._at_once(requests)
"""

LAUNCHER = """
import sys, time
from pathlib import Path
from deploy.server import EmbeddedServer, ServerOptions

server = EmbeddedServer(ServerOptions(repository=Path(sys.argv[1]), model="double", log_dir=Path(sys.argv[2])))
server.start()
time.sleep(60)
"""


@pytest.fixture
def options(tmp_path: Path) -> ServerOptions:
    return model_options(tmp_path, DOUBLE)


def model_options(folder: Path, code: str) -> ServerOptions:
    model = folder / "repository" / "double"
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(CONFIG)
    (model / "1" / "model.py").write_text(code)
    return ServerOptions(repository=folder / "repository", model="double", log_dir=folder / "log")


@contextmanager
def grpc_client(endpoint: Endpoint) -> Iterator[triton_grpc.InferenceServerClient]:
    client = triton_grpc.InferenceServerClient(f"{endpoint.host}:{endpoint.grpc_port}")
    try:
        yield client
    finally:
        client.close()


def doubled(endpoint: Endpoint, value: int) -> int:
    x = triton_grpc.InferInput("x", [1, 1], "INT64")
    x.set_data_from_numpy(np.array([[value]]))
    with grpc_client(endpoint) as client:
        return int(client.infer("double", [x]).as_numpy("y")[0, 0])


@contextmanager
def supervised(server: EmbeddedServer) -> Iterator[None]:
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=1) as threads:
        watching = threads.submit(server.supervise, stop)
        try:
            yield
        finally:
            stop.set()
        watching.result()


@contextmanager
def launcher(options: ServerOptions) -> Iterator[tuple[subprocess.Popen[bytes], Endpoint]]:
    """Another process with a server that answers."""
    command = [sys.executable, "-c", LAUNCHER, str(options.repository), str(options.log_dir)]
    with subprocess.Popen(command, cwd=ROOT) as launching:
        until(lambda: state(options) is not None)
        left = state(options)
        assert left is not None
        assert left.supervisor_pid == launching.pid
        yield launching, left


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def family(pid: int) -> list[psutil.Process]:
    """tritonserver and its stubs."""
    server = psutil.Process(pid)
    return [server, *server.children()]


def lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def regions(server_id: str) -> list[Path]:
    return list(Path("/dev/shm").glob(f"{server_id}*"))


def state(options: ServerOptions) -> Endpoint | None:
    return log_folder(options).read_state()


def assert_nothing_stays(processes: list[psutil.Process], endpoint: Endpoint, options: ServerOptions) -> None:
    assert not [process for process in processes if lives(process)]
    assert not regions(endpoint.server_id)
    assert state(options) is None


def listener(port: int = 0) -> socket.socket:
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", port))
    listening.listen()
    return listening


# ---------------------------------------------------------------------------------------------- without a server


def test_every_given_port_in_use_is_named_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, options: ServerOptions
) -> None:
    monkeypatch.setattr(runtime, "version", lambda name: "1.26.4")
    with listener() as first, listener() as second:
        grpc, http = first.getsockname()[1], second.getsockname()[1]
        taken = dataclasses.replace(options, grpc_port=grpc, http_port=http)
        with pytest.raises(Faults) as raised:
            EmbeddedServer(taken).start()
    assert [fault.place for fault in raised.value.faults] == [f"grpc port {grpc}", f"http port {http}"]
    message = str(raised.value)
    assert f"got 127.0.0.1:{grpc}: Address already in use" in message
    assert "wanted a port that nothing else listens on" in message
    assert "leave it out for a free one" in message
    assert not (options.log_dir / "tritonserver.log").read_bytes()


@pytest.mark.parametrize(("port", "reason"), [(70000, "0-65535"), (45123, "given for two protocols")])
def test_ports_that_can_not_be_are_refused(
    monkeypatch: pytest.MonkeyPatch, options: ServerOptions, port: int, reason: str
) -> None:
    monkeypatch.setattr(runtime, "version", lambda name: "1.26.4")
    with pytest.raises(Faults, match=reason):
        EmbeddedServer(dataclasses.replace(options, http_port=port, metrics_port=port)).start()


def test_a_held_port_is_handed_to_no_one_and_listened_on_by_its_owner(options: ServerOptions) -> None:
    with embedded.held_ports(options) as ports:
        assert len({ports.grpc, ports.http, ports.metrics}) == 3
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", ports.grpc))
        listener(ports.grpc).close()


def test_a_missing_model_is_a_fault(options: ServerOptions) -> None:
    with pytest.raises(Fault, match=r"absent/config\.pbtxt: got no such file"):
        EmbeddedServer(dataclasses.replace(options, model="absent")).start()


def test_an_environment_that_can_not_serve_is_told_all_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "version", lambda name: "2.4.1")
    monkeypatch.setattr(runtime, "PYTHON", "3.99")
    with pytest.raises(Faults) as raised:
        runtime.find_runtime()
    numpy_fault, stub_fault, libpython_fault = raised.value.faults
    assert "pip install 'numpy<2'" in numpy_fault.remedy
    assert "3.11, 3.12" in stub_fault.wanted
    assert libpython_fault.got == "no libpython3.99.so.1.0"
    assert "--enable-shared" in libpython_fault.remedy


def test_a_missing_wheel_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(runtime, "distribution", missing)
    with pytest.raises(Fault, match="pip install nvidia-pytriton"):
        runtime.find_runtime()


def test_starts_at_once_share_one_whole_backend_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "version", lambda name: "1.26.4")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ThreadPoolExecutor(max_workers=8) as threads:
        found = [started.result() for started in [threads.submit(runtime.find_runtime) for _ in range(8)]]
    (backends,) = {each.backends for each in found}
    assert list((tmp_path / "rankforge").iterdir()) == [backends]
    assert {path.name for path in (backends / "python").iterdir()} == {
        "libtriton_python.so",
        "triton_python_backend_stub",
        "triton_python_backend_utils.py",
    }


def test_a_cache_that_can_not_be_written_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "version", lambda name: "1.26.4")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(Fault, match="set XDG_CACHE_HOME"):
        runtime.find_runtime()


def test_restarts_are_counted_within_a_window(options: ServerOptions) -> None:
    budget = embedded.RestartBudget(dataclasses.replace(options, max_restarts=2, restart_window_s=10.0))
    assert [budget.allows(now) for now in (0.0, 1.0, 2.0, 9.9, 10.0, 10.5, 11.0)] == [
        True,
        True,
        False,
        False,
        True,
        False,
        True,
    ]


def test_the_reasons_in_a_log_are_its_errors_once_each() -> None:
    text = "\n".join(
        [
            'E1124 04:26:25.48 57 server.cc:241] "CudaDriverHelper has not been initialized."',
            'I1124 04:26:25.55 57 python_be.cc:22] "loading: double:1"',
            'E1124 04:26:25.81 57 backend_model.cc:692] "ERROR: Failed to create instance: ValueError: no"',
            r'''E1124 04:26:25.81 57 model_life.cc:6] "failed to load 'double': ValueError: no\n\nAt:\n  model.py"''',
            "error: creating server: Internal - failed to load all models",
        ]
    )
    assert reasons(text) == "failed to load 'double': ValueError: no\n\nAt:\n  model.py"
    assert reasons("") == "nothing in the log"


# ------------------------------------------------------------------------------------------------- with a server


@pytest.mark.triton
def test_it_serves_on_the_loopback_interface_and_leaves_nothing(
    options: ServerOptions, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")
    monkeypatch.setenv("AIP_MODE", "PREDICTION")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with EmbeddedServer(options) as server:
        endpoint = server.start()
        monkeypatch.delenv("http_proxy")
        assert doubled(endpoint, 2**53 + 1) == 2**54 + 2
        assert state(options) == endpoint
        processes = family(endpoint.pid)
        listening = {c.laddr for c in processes[0].net_connections("inet") if c.status == psutil.CONN_LISTEN}
        assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
        assert {address.port for address in listening} == {
            endpoint.grpc_port,
            endpoint.http_port,
            endpoint.metrics_port,
        }
        with pytest.raises(RuntimeError, match="started already"):
            server.start()
        assert len(processes) == 3
    assert_nothing_stays(processes, endpoint, options)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.triton
def test_inference_and_the_model_config_are_open_and_the_rest_is_closed(options: ServerOptions) -> None:
    with EmbeddedServer(options) as server:
        endpoint = server.start()
        with grpc_client(endpoint) as client:
            config = client.get_model_config("double", as_json=True)
            assert config["config"]["parameters"]["signature"]["string_value"] == "x -> y"
            for closed in (
                client.get_inference_statistics,
                client.get_model_repository_index,
                client.get_system_shared_memory_status,
                client.get_trace_settings,
                client.get_log_settings,
            ):
                with pytest.raises(InferenceServerException, match="restricted"):
                    closed()
        for path in ("/v2/models/stats", "/v2/systemsharedmemory/status", "/v2/trace/setting", "/v2/logging"):
            connection = HTTPConnection(endpoint.host, endpoint.http_port)
            connection.request("GET", path, headers={"Connection": "close"})
            assert connection.getresponse().status == 403
            connection.close()


@pytest.mark.triton
@pytest.mark.parametrize("victim", [0, 1], ids=["tritonserver", "stub"])
def test_a_killed_process_is_answered_by_a_restart_on_the_same_ports(options: ServerOptions, victim: int) -> None:
    with EmbeddedServer(options) as server:
        endpoint = server.start()
        before = family(endpoint.pid)
        with supervised(server):
            before[victim].send_signal(signal.SIGKILL)
            until(lambda: (now := state(options)) is not None and now.pid != endpoint.pid)
        restarted = state(options)
        assert restarted is not None
        assert dataclasses.replace(restarted, pid=endpoint.pid) == endpoint
        assert not [process for process in before if lives(process)]
        assert len(regions(endpoint.server_id)) == 2  # one for each new stub: those of the old ones are removed
        assert [doubled(endpoint, value) for value in range(4)] == [0, 2, 4, 6]
        after = family(restarted.pid)
    assert_nothing_stays(before + after, endpoint, options)


@pytest.mark.triton
def test_a_server_that_keeps_dying_is_given_up_with_a_fault(options: ServerOptions) -> None:
    with EmbeddedServer(dataclasses.replace(options, max_restarts=1)) as server:
        endpoint = server.start()
        (options.repository / "double" / "1" / "model.py").write_text(BROKEN)
        before = family(endpoint.pid)
        before[1].send_signal(signal.SIGKILL)
        with pytest.raises(Fault) as raised:
            server.supervise(threading.Event())
        assert "1 restarts within 300 s" in raised.value.got
        assert "weights.bin holds 3 tables, wanted 26" in raised.value.got
    assert_nothing_stays(before, endpoint, options)


@pytest.mark.triton
def test_a_server_ends_with_its_killed_launcher(options: ServerOptions) -> None:
    with launcher(options) as (launching, left):
        processes = family(left.pid)
        launching.kill()
        until(lambda: not [process for process in processes if lives(process)])
    assert "All models are stopped" in left.log.read_text()
    assert not regions(left.server_id)


@pytest.mark.triton
def test_a_start_sweeps_up_after_a_killed_launcher(options: ServerOptions) -> None:
    with launcher(options) as (launching, left):
        processes = family(left.pid)
        processes[1].send_signal(signal.SIGKILL)
        launching.kill()
    Path("/dev/shm", f"{left.server_id}leaked").touch()
    with EmbeddedServer(dataclasses.replace(options, grpc_port=left.grpc_port)) as server:
        endpoint = server.start()
        assert not [process for process in processes if lives(process)]
        assert not regions(left.server_id)
        assert doubled(endpoint, 5) == 10


@pytest.mark.triton
def test_a_start_that_is_called_off_leaves_nothing(tmp_path: Path) -> None:
    options = model_options(tmp_path, SLOW)
    log = options.log_dir / "tritonserver.log"
    stop = threading.Event()
    with EmbeddedServer(options) as server, ThreadPoolExecutor(max_workers=1) as thread:
        started = thread.submit(server.start, stop)
        until(lambda: log.is_file() and "slow model begins" in log.read_text())
        stop.set()
        endpoint = started.result()
        server.supervise(stop)
        processes = family(endpoint.pid)
    assert_nothing_stays(processes, endpoint, options)


@pytest.mark.triton
def test_a_model_that_takes_too_long_is_a_fault(tmp_path: Path) -> None:
    before = psutil.Process().children()
    options = dataclasses.replace(model_options(tmp_path, SLOW), ready_timeout_s=1.0)
    with (
        EmbeddedServer(options) as server,
        pytest.raises(Fault, match=r"no answer of HTTP within 1 s(.|\n)*slow model"),
    ):
        server.start()
    assert psutil.Process().children() == before


@pytest.mark.triton
def test_a_server_outlives_the_thread_that_started_it(options: ServerOptions) -> None:
    """The kernel sends a child its parent-death signal when the parent's thread ends, not its process."""
    with EmbeddedServer(options) as server:
        with ThreadPoolExecutor(max_workers=1) as thread:
            endpoint = thread.submit(server.start).result()
        assert [doubled(endpoint, value) for value in range(3)] == [0, 2, 4]
        assert "Signal (15) received" not in endpoint.log.read_text()


@pytest.mark.triton
def test_a_start_takes_other_ports_when_it_lost_one(options: ServerOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    held_ports, lost = embedded.held_ports, []

    @contextmanager
    def raced_ports(options: ServerOptions) -> Iterator[Ports]:
        with held_ports(options) as ports:
            if not lost:
                lost.append(listener(ports.metrics))
            yield ports

    monkeypatch.setattr(embedded, "held_ports", raced_ports)
    try:
        with EmbeddedServer(options) as server:
            endpoint = server.start()
            assert endpoint.metrics_port != lost[0].getsockname()[1]
            assert doubled(endpoint, 1) == 2
    finally:
        lost[0].close()


@pytest.mark.triton
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (BROKEN, "failed to load 'double' version 1: Internal: ValueError: weights.bin holds 3 tables, wanted 26"),
        (CRASHING, "illegal instruction in weights.so"),
        ("import no_such_module", "No module named 'no_such_module'"),
    ],
    ids=["raises", "crashes", "imports"],
)
def test_a_model_that_does_not_load_is_a_fault_with_its_own_error(tmp_path: Path, code: str, reason: str) -> None:
    before = psutil.Process().children()
    options = model_options(tmp_path, code)
    with EmbeddedServer(options) as server, pytest.raises(Fault) as raised:
        server.start()
    assert raised.value.place == str(options.log_dir / "tritonserver.log")
    assert reason in raised.value.got
    assert state(options) is None
    assert psutil.Process().children() == before


@pytest.mark.triton
def test_two_servers_live_side_by_side_each_with_its_own_log_folder(options: ServerOptions, tmp_path: Path) -> None:
    with EmbeddedServer(options) as first, EmbeddedServer(options) as second:
        one = first.start()
        with pytest.raises(Fault, match=f"folder of a server that runs.*pid={one.pid}"):
            second.start()
        with EmbeddedServer(dataclasses.replace(options, log_dir=tmp_path / "other")) as third:
            other = third.start()
            ports = [(e.grpc_port, e.http_port, e.metrics_port) for e in (one, other)]
            assert len({port for three in ports for port in three}) == 6
            assert doubled(other, 3) == 6
        assert doubled(one, 4) == 8


@pytest.mark.triton
def test_a_request_in_flight_is_answered_before_the_server_stops(tmp_path: Path) -> None:
    options = model_options(tmp_path, SLOW_TO_ANSWER)
    with ThreadPoolExecutor(max_workers=1) as thread:
        with EmbeddedServer(options) as server:
            endpoint = server.start()
            answer = thread.submit(doubled, endpoint, 21)
            until(lambda: "request arrived" in endpoint.log.read_text())
        assert answer.result() == 42


@pytest.mark.triton
def test_an_open_http_connection_of_a_client_does_not_hold_the_stop_for_ever(
    options: ServerOptions, caplog: pytest.LogCaptureFixture
) -> None:
    with EmbeddedServer(dataclasses.replace(options, exit_timeout_s=2)) as server:
        endpoint = server.start()
        processes = family(endpoint.pid)
        idle = HTTPConnection(endpoint.host, endpoint.http_port)
        idle.request("GET", "/v2/health/live")
        idle.getresponse().read()
    idle.close()
    assert "tritonserver ended with" in caplog.text
    assert_nothing_stays(processes, endpoint, options)
