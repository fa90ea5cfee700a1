"""Serving a bundle in the foreground: repository, server, state file, and the way out."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from deploy.bundle import MODEL, ServeDefaults
from deploy.repository import make_repository
from deploy.server import EmbeddedServer, Endpoint, ServerOptions
from etl.artifact import write_json


def serve(
    bundle_dir: Path,
    *,
    state: Path,
    grpc_port: int | None = None,
    http_port: int | None = None,
    instances: int | None = None,
    ready: Callable[[Endpoint], None],
) -> None:
    """Serves until SIGTERM or SIGINT. `state` holds the endpoint as JSON from the moment it answers until the end.

    The repository and the server's logs lie beside the bundle, in `repository/` and `server/`.

    Raises:
        Fault, Faults: a bundle that is none or was changed, a port in use, a model that does not load.
    """
    state.unlink(missing_ok=True)
    repository = bundle_dir.parent / "repository"
    defaults = make_repository(bundle_dir, repository, instances=instances).serve
    options = server_options(defaults, repository=repository, grpc_port=grpc_port, http_port=http_port)
    with stop_signals() as stop, EmbeddedServer(options) as server:
        endpoint = server.start()
        state.parent.mkdir(parents=True, exist_ok=True)
        write_json(state, asdict(endpoint) | {"log": str(endpoint.log)})
        ready(endpoint)
        try:
            server.supervise(stop)
        finally:
            state.unlink(missing_ok=True)


def server_options(
    defaults: ServeDefaults, *, repository: Path, grpc_port: int | None, http_port: int | None
) -> ServerOptions:
    """The bundle's own settings where the command line says nothing."""
    return ServerOptions(
        repository=repository,
        model=MODEL,
        log_dir=repository.parent / "server",
        grpc_port=grpc_port or defaults.grpc_port,
        http_port=http_port or defaults.http_port,
        metrics_port=defaults.metrics_port,
    )


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set; afterwards they do what they did before."""
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
