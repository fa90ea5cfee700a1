"""Serving a bundle in the foreground: repository, server, state file, and the way out."""

import contextlib
import fcntl
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

from deploy.bundle import MODEL, ServeDefaults, read_bundle
from deploy.network import Network
from deploy.repository import REPOSITORY, locked, make_repository
from deploy.server import EmbeddedServer, Endpoint, ServerOptions, require_safe_bind
from etl.artifact import write_json
from etl.faults import Fault


@dataclass(frozen=True)
class Wanted:
    """What the command line says; None is what the bundle says."""

    grpc_port: int | None = None
    http_port: int | None = None
    instances: int | None = None
    network: Network = field(default_factory=Network)


def serve(folder: Path, wanted: Wanted, *, state: Path, ready: Callable[[Endpoint], None]) -> None:
    """Serves until SIGTERM or SIGINT. `state` holds the endpoint as JSON from the moment it answers until the end.

    `folder` is a bundle, which becomes the served version of the `repository/` beside it, or such a repository, served
    as it stands. The server's log and key lie beside, in `server/`.

    Raises:
        Fault, Faults: a bundle that is none or was changed, a port in use, a model that does not load, or another
            server that serves from the same place.
    """
    home = folder.resolve().parent
    with _claimed(home), stop_signals() as stop:
        state.unlink(missing_ok=True)
        repository, defaults = _repository(folder, home=home, instances=wanted.instances)
        options = server_options(repository, defaults, home=home, wanted=wanted)
        require_safe_bind(options)
        with EmbeddedServer(options) as server:
            _supervise(server, stop, state=state, ready=ready)


def _supervise(
    server: EmbeddedServer, stop: threading.Event, *, state: Path, ready: Callable[[Endpoint], None]
) -> None:
    endpoint = server.start()
    try:
        state.parent.mkdir(parents=True, exist_ok=True)
        write_json(state, asdict(endpoint) | {"log": str(endpoint.log), "key_file": str(endpoint.key_file)})
        ready(endpoint)
        server.supervise(stop)
    finally:
        state.unlink(missing_ok=True)


def _repository(folder: Path, *, home: Path, instances: int | None) -> tuple[Path, ServeDefaults]:
    if not (folder / REPOSITORY).is_file():
        return home / "repository", make_repository(folder, home / "repository", instances=instances).serve
    with locked(folder) as repository:
        if (current := repository.current()) is None:
            remedy = "publish a bundle into it"
            raise Fault(str(folder), got="a repository without a served version", wanted="one with", remedy=remedy)
        repository.serve(current, instances=instances)
        return folder, read_bundle(repository.version(current)).serve


def server_options(repository: Path, defaults: ServeDefaults, *, home: Path, wanted: Wanted) -> ServerOptions:
    """The bundle's own settings where the command line says nothing."""
    return ServerOptions(
        repository=repository,
        model=MODEL,
        log_dir=home / "server",
        grpc_port=wanted.grpc_port or defaults.grpc_port,
        http_port=wanted.http_port or defaults.http_port,
        metrics_port=defaults.metrics_port,
        host=wanted.network.host,
        public=wanted.network.i_know,
        tls=wanted.network.tls,
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
