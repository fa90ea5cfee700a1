"""The server's three ports, held for as long as the server is meant to answer on them."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from deploy.server.endpoint import HOST, ServerOptions
from etl.faults import Fault, Faults


@dataclass(frozen=True)
class Ports:
    grpc: int
    http: int
    metrics: int


@contextmanager
def held_ports(options: ServerOptions) -> Iterator[Ports]:
    """Binds each port without listening on it. Raises Faults naming every given port that can't be had.

    A bound port is handed to no one who asks for a free one, neither before the server listens nor while it
    restarts; with SO_REUSEADDR on both sides the server itself can still bind and listen.
    """
    asked = {"grpc": options.grpc_port, "http": options.http_port, "metrics": options.metrics_port}
    with ExitStack() as sockets:
        holders = {protocol: sockets.enter_context(socket.socket()) for protocol in asked}
        given = {protocol: port for protocol, port in asked.items() if port is not None}
        if faults := _repeated(given) + _bind_given(holders, given):
            raise Faults(faults)
        for protocol in asked.keys() - given.keys():
            _bind(holders[protocol], 0)
        yield Ports(**{protocol: holder.getsockname()[1] for protocol, holder in holders.items()})


def _bind(holder: socket.socket, port: int) -> None:
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind((HOST, port))


def _bind_given(holders: dict[str, socket.socket], given: dict[str, int]) -> list[Fault]:
    faults = []
    for protocol, port in given.items():
        try:
            _bind(holders[protocol], port)
        except (OSError, OverflowError) as error:
            faults.append(_fault(protocol, port, reason=getattr(error, "strerror", None) or str(error)))
    return faults


def _repeated(given: dict[str, int]) -> list[Fault]:
    ports = list(given.values())
    twice = [(protocol, port) for protocol, port in given.items() if ports.count(port) > 1]
    return [_fault(protocol, port, reason="given for two protocols") for protocol, port in twice]


def _fault(protocol: str, port: int, *, reason: str) -> Fault:
    return Fault(
        f"{protocol} port {port}",
        got=f"{HOST}:{port}: {reason}",
        wanted="a port that nothing else listens on",
        remedy=f"stop what listens there, give another {protocol} port, or leave it out for a free one",
    )
