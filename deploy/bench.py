"""Load on a server, and what the same rows cost elsewhere: latencies, rows/s and CPU time a row.

Closed loop: so many clients, each sends its next request when the last one is answered. Open loop: requests arrive at
random times (Poisson) whether or not the server keeps up, and each waits from its own arrival on, queues included.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Semaphore
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import numpy.typing as npt
import psutil
from tritonclient.grpc import service_pb2

from deploy.connect import channel_to
from etl.faults import Fault
from etl.transform import Packed

if TYPE_CHECKING:
    from deploy.ranker import Request

_INFER = "/inference.GRPCInferenceService/ModelInfer"
_CHANNEL = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
_KINDS = {np.int64: "INT64", np.float64: "FP64", np.float32: "FP32"}
_DEADLINE_S = 10.0
_MOST_IN_FLIGHT = 512  # of an open loop: beyond, the server has lost the race and the rest would only queue here
_WARM_UP_S = 0.5


@dataclass(frozen=True)
class Load:
    """`rate` is requests/s of an open loop; None is a closed loop of `clients`. `tls` is a folder, see `connect`."""

    clients: int = 8
    rate: float | None = None
    seconds: float = 4.0
    tls: Path | None = None


@dataclass(frozen=True)
class Measured:
    """One side of a comparison. CPU time is that of the processes that score; None where they are not known."""

    side: str
    requests: int
    failed: int
    rows_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    cpu_us_per_row: float | None
    latencies_ms: npt.NDArray[np.float64] = field(repr=False, compare=False)


def requests_of(packed: "Packed | Request", model: str, *, rows: int, most: int = 64) -> list[bytes]:
    """Requests of `rows` rows each as they travel, over the packed rows again and again. Their making is not timed."""
    count = min(most, max(1, len(packed.keys) * 4 // rows))
    take = np.arange(count * rows) % len(packed.keys)
    return [
        _request(model, {"keys": packed.keys[part], "numbers": packed.numbers[part]}, asked="score")
        for part in np.array_split(take, count)
    ]


def ranking_requests_of(
    users: "Packed | Request", items: "Packed | Request", *, model: str, candidates: int, most: int = 64
) -> list[bytes]:
    """Requests of one user and so many candidates each, over the packed users and candidates again and again."""
    count = min(most, max(1, len(items.keys) * 4 // candidates))
    take = np.arange(count * candidates) % len(items.keys)
    found = []
    for at, part in enumerate(np.array_split(take, count)):
        one = [at % len(users.keys)]
        inputs = {"user_keys": users.keys[one], "user_numbers": users.numbers[one]}
        inputs |= {"item_keys": items.keys[None, part], "item_numbers": items.numbers[None, part]}
        found.append(_request(model, inputs, asked="rank_score"))
    return found


def _request(model: str, inputs: Mapping[str, npt.NDArray[Any]], *, asked: str) -> bytes:
    message = service_pb2.ModelInferRequest(model_name=model)
    message.outputs.add(name=asked)
    for name, array in inputs.items():
        if array.size:
            message.inputs.add(name=name, datatype=_KINDS[array.dtype.type], shape=array.shape)
            message.raw_input_contents.append(np.ascontiguousarray(array).tobytes())
    text: bytes = message.SerializeToString()
    return text


def load_server(url: str, requests: Sequence[bytes], *, rows: int, load: Load, side: str, pid: int | None) -> Measured:
    """Sends the requests in turn. `pid` is tritonserver's: its CPU time and its stubs' are counted.

    Raises Fault where not one request is answered.
    """
    with channel_to(url, tls=load.tls, options=_CHANNEL) as channel:
        call = channel.unary_unary(_INFER)
        _run(call, requests, load=replace(load, seconds=_WARM_UP_S))
        before_s = cpu_seconds(pid)
        begin = time.perf_counter()
        latencies, errors = _run(call, requests, load=load)
        seconds = time.perf_counter() - begin
        cpu_s = cpu_seconds(pid) - before_s
    if not latencies:
        remedy = "send what the server takes, see 'deploy bench --help'"
        raise Fault(url, got=errors[0] if errors else "no answer", wanted="answers", remedy=remedy)
    return measured(side, latencies, failed=len(errors), rows=rows, seconds=seconds, cpu_s=cpu_s if pid else None)


def run_in_process(score: Callable[[int], None], *, rows: int, seconds: float, side: str) -> Measured:
    """Calls `score` with the number of each request, in this thread, which alone should compute."""
    for at in range(3):
        score(at)
    latencies: list[float] = []
    begin, cpu_s = time.perf_counter(), time.process_time()
    while (start := time.perf_counter()) < begin + seconds:
        score(len(latencies))
        latencies.append(time.perf_counter() - start)
    seconds, cpu_s = time.perf_counter() - begin, time.process_time() - cpu_s
    return measured(side, latencies, failed=0, rows=rows, seconds=seconds, cpu_s=cpu_s)


def measured(
    side: str, latencies_s: Sequence[float], *, failed: int, rows: int, seconds: float, cpu_s: float | None
) -> Measured:
    """From the latencies of the answered requests, and the time that all of them took."""
    found_ms = np.asarray(latencies_s) * 1e3
    done = len(found_ms) * rows
    p50, p95, p99 = (float(value) for value in np.percentile(found_ms, (50, 95, 99)))
    cpu_us = None if cpu_s is None else cpu_s * 1e6 / done
    return Measured(side, len(found_ms), failed, done / seconds, p50, p95, p99, cpu_us, found_ms)


def _run(call: Any, requests: Sequence[bytes], *, load: Load) -> tuple[list[float], list[str]]:
    return _open(call, requests, load=load) if load.rate else _closed(call, requests, load=load)


def _closed(call: Any, requests: Sequence[bytes], *, load: Load) -> tuple[list[float], list[str]]:
    end = time.perf_counter() + load.seconds

    def client(first: int) -> tuple[list[float], list[str]]:
        latencies: list[float] = []
        errors: list[str] = []
        at = first
        while (start := time.perf_counter()) < end:
            try:
                call(requests[at % len(requests)], timeout=_DEADLINE_S)
                latencies.append(time.perf_counter() - start)
            except grpc.RpcError as error:
                errors.append(str(error.details()))
            at += load.clients
        return latencies, errors

    with ThreadPoolExecutor(max_workers=load.clients) as threads:
        parts = list(threads.map(client, range(load.clients)))
    return [each for part in parts for each in part[0]], [each for part in parts for each in part[1]]


def _open(call: Any, requests: Sequence[bytes], *, load: Load) -> tuple[list[float], list[str]]:
    latencies: list[float] = []
    errors: list[str] = []
    free = Semaphore(_MOST_IN_FLIGHT)
    arrivals = random.Random(1)
    due = time.perf_counter()
    end, at = due + load.seconds, 0
    while due < end:
        due += arrivals.expovariate(load.rate or 1.0)
        if (early := due - time.perf_counter()) > 0:
            time.sleep(early)
        free.acquire()
        answer = call.future(requests[at % len(requests)], timeout=_DEADLINE_S)
        answer.add_done_callback(_note(due, latencies=latencies, errors=errors, free=free))
        at += 1
    for _ in range(_MOST_IN_FLIGHT):
        free.acquire()
    return latencies, errors


def _note(due: float, *, latencies: list[float], errors: list[str], free: Semaphore) -> Callable[[Any], None]:
    def done(answer: Any) -> None:
        error = answer.exception()
        if error is None:
            latencies.append(time.perf_counter() - due)
        else:
            errors.append(str(answer.details()))
        free.release()

    return done


def cpu_seconds(server_pid: int | None) -> float:
    """Of tritonserver and its stubs so far."""
    if server_pid is None:
        return 0.0
    total = 0.0
    server = psutil.Process(server_pid)
    for process in (server, *server.children()):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total
