"""A closed loop of requests over HTTP that takes little of the cores which the server needs too.

One thread, one connection a client, requests that were written before. Python's gRPC spends as much CPU time on a
request of 64 rows as tritonserver, so on a few cores it would bound what is measured.
"""

import json
import selectors
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from deploy.bench import Load, Measured, cpu_seconds, measured
from deploy.server import Endpoint
from etl.transform import Packed

_WARM_UP_S = 0.3
_DEADLINE_S = 10.0
_END = b"\r\n\r\n"


def http_requests(packed: Packed, model: str, *, rows: int, count: int = 64) -> list[bytes]:
    """Requests of `rows` rows each as they travel, over the packed rows again and again."""
    take = np.arange(count * rows) % len(packed.keys)
    return [_request(model, packed.keys[part], numbers=packed.numbers[part]) for part in np.array_split(take, count)]


def _request(model: str, keys: npt.NDArray[np.int64], *, numbers: npt.NDArray[np.float64]) -> bytes:
    inputs = [
        {"name": name, "datatype": kind, "shape": array.shape, "parameters": {"binary_data_size": array.nbytes}}
        for name, kind, array in (("keys", "INT64", keys), ("numbers", "FP64", numbers))
    ]
    outputs = [{"name": "score", "parameters": {"binary_data": True}}]
    told = json.dumps({"inputs": inputs, "outputs": outputs}).encode()
    body = told + keys.tobytes() + numbers.tobytes()
    lines = [
        f"POST /v2/models/{model}/infer HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/octet-stream",
        f"Inference-Header-Content-Length: {len(told)}",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join(lines).encode() + _END + body


@dataclass
class _Client:
    """One connection: which request is next, when the last one was sent, what came back of its answer."""

    connection: socket.socket
    next: int
    sent_s: float = 0.0
    got: bytearray = field(default_factory=bytearray)

    def send(self, requests: Sequence[bytes], *, clients: int) -> None:
        self.got.clear()
        self.sent_s = time.perf_counter()
        self.connection.sendall(requests[self.next % len(requests)])
        self.next += clients

    def whole(self) -> bool:
        """Whether what was received ends the answer; raises RuntimeError for one that is no success."""
        part = self.connection.recv(1 << 16)
        self.got += part
        head, end, body = self.got.partition(_END)
        if not part or (end and not head.startswith(b"HTTP/1.1 200")):
            raise RuntimeError(f"the server answers: {self.got[:300]!r}")
        size = next((line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), None)
        return bool(end) and size is not None and len(body) >= int(size.partition(b":")[2])


def load_http(server: Endpoint, requests: Sequence[bytes], *, rows: int, load: Load, side: str) -> Measured:
    """Each client sends its next request when the last one is answered; the CPU time is the server's and its stubs'."""
    with ExitStack() as open_:
        address = (server.host, server.http_port)
        sockets = [open_.enter_context(socket.create_connection(address, _DEADLINE_S)) for _ in range(load.clients)]
        clients = [_Client(connection, at) for at, connection in enumerate(sockets)]
        for client in clients:
            client.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _closed(clients, requests, seconds=_WARM_UP_S)
        before_s, begin = cpu_seconds(server.pid), time.perf_counter()
        latencies = _closed(clients, requests, seconds=load.seconds)
        seconds, cpu_s = time.perf_counter() - begin, cpu_seconds(server.pid) - before_s
    return measured(side, latencies, failed=0, rows=rows, seconds=seconds, cpu_s=cpu_s)


def _closed(clients: Sequence[_Client], requests: Sequence[bytes], *, seconds: float) -> list[float]:
    """Seconds from sending to the whole answer, of each request; returns when all are answered."""
    latencies: list[float] = []
    end = time.perf_counter() + seconds
    with selectors.DefaultSelector() as selector:
        for client in clients:
            selector.register(client.connection, selectors.EVENT_READ, client)
            client.send(requests, clients=len(clients))
        while selector.get_map():
            if not (ready := selector.select(_DEADLINE_S)):
                raise RuntimeError(f"no answer within {_DEADLINE_S:g} s")
            for key, _ in ready:
                client = key.data
                if not client.whole():
                    continue
                now = time.perf_counter()
                latencies.append(now - client.sent_s)
                if now < end:
                    client.send(requests, clients=len(clients))
                else:
                    selector.unregister(client.connection)
    return latencies
