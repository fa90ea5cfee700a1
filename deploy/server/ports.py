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
    hosts = {"grpc": options.host, "http": HOST, "metrics": HOST}
    with ExitStack() as sockets:
        holders = {protocol: sockets.enter_context(_socket(host)) for protocol, host in hosts.items()}
        given = {protocol: port for protocol, port in asked.items() if port is not None}
        if faults := _repeated(given) + _bind_given(holders, given, hosts=hosts):
            raise Faults(faults)
        for protocol in asked.keys() - given.keys():
            _bind(holders[protocol], hosts[protocol], port=0)
        yield Ports(**{protocol: holder.getsockname()[1] for protocol, holder in holders.items()})


def _socket(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)


def _bind(holder: socket.socket, host: str, *, port: int) -> None:
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind((host, port))


def _bind_given(holders: dict[str, socket.socket], given: dict[str, int], *, hosts: dict[str, str]) -> list[Fault]:
    faults = []
    for protocol, port in given.items():
        try:
            _bind(holders[protocol], hosts[protocol], port=port)
        except (OSError, OverflowError) as error:
            reason = f"{hosts[protocol]}:{port}: {getattr(error, 'strerror', None) or error}"
            faults.append(_fault(protocol, port, reason=reason))
    return faults


def _repeated(given: dict[str, int]) -> list[Fault]:
    ports = list(given.values())
    twice = [(protocol, port) for protocol, port in given.items() if ports.count(port) > 1]
    return [_fault(protocol, port, reason="given for two protocols") for protocol, port in twice]


def _fault(protocol: str, port: int, *, reason: str) -> Fault:
    return Fault(
        f"{protocol} port {port}",
        got=reason,
        wanted="a port that nothing else listens on",
        remedy=f"stop what listens there, give another {protocol} port, or leave it out for a free one",
    )
