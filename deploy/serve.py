"""Serving a bundle in the foreground: repository, server, state file, and the way out."""

import contextlib
import fcntl
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
from etl.faults import Fault


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
        Fault, Faults: a bundle that is none or was changed, a port in use, a model that does not load, or another
            server that serves from the same place.
    """
    home = bundle_dir.resolve().parent
    with _claimed(home), stop_signals() as stop:
        state.unlink(missing_ok=True)
        defaults = make_repository(bundle_dir, home / "repository", instances=instances).serve
        options = server_options(defaults, home=home, grpc_port=grpc_port, http_port=http_port)
        with EmbeddedServer(options) as server:
            _supervise(server, stop, state=state, ready=ready)


def _supervise(
    server: EmbeddedServer, stop: threading.Event, *, state: Path, ready: Callable[[Endpoint], None]
) -> None:
    endpoint = server.start()
    try:
        state.parent.mkdir(parents=True, exist_ok=True)
        write_json(state, asdict(endpoint) | {"log": str(endpoint.log)})
        ready(endpoint)
        server.supervise(stop)
    finally:
        state.unlink(missing_ok=True)


def server_options(
    defaults: ServeDefaults, *, home: Path, grpc_port: int | None, http_port: int | None
) -> ServerOptions:
    """The bundle's own settings where the command line says nothing."""
    return ServerOptions(
        repository=home / "repository",
        model=MODEL,
        log_dir=home / "server",
        grpc_port=grpc_port or defaults.grpc_port,
        http_port=http_port or defaults.http_port,
        metrics_port=defaults.metrics_port,
    )


@contextlib.contextmanager
def _claimed(home: Path) -> Iterator[None]:
    """Keeps a second server from replacing the repository and the state file of one that runs."""
    try:
        lock = (home / ".serve.lock").open("w")
    except OSError as error:
        wanted, remedy = "a folder with a bundle in it, writable", "check the path"
        raise Fault(str(home), got=str(error), wanted=wanted, remedy=remedy) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            got, remedy = "a server runs from it", "stop that one, or copy the bundle into a folder of its own"
            raise Fault(str(home), got=got, wanted="one server a folder", remedy=remedy) from None
        yield


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
