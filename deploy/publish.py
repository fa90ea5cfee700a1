"""A bundle becomes the served version, and the version before it again: no request fails, nothing unproven is served.

A new version first runs as a model of its own, which no client asks, and has to give the golden requests their
scores. Then one rename makes it the version that the config names, and Triton loads it beside the old one, which
goes on until the new one is ready and then finishes what it has accepted.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tritonclient.grpc import model_config_pb2 as pb

from deploy.bundle import MARKER, MODEL, Bundle, read_bundle
from deploy.client import Client
from deploy.control import ModelControl, Server
from deploy.repository import CANDIDATE, Repository, locked, model_config
from deploy.server import EmbeddedServer, ServerOptions
from deploy.verify import golden_comparisons
from etl.artifact import sha256
from etl.faults import Fault


@dataclass(frozen=True)
class Published:
    """The version that is served now, the one before, and those that still lie in the repository."""

    version: int
    before: int | None
    kept: tuple[int, ...]


def publish(bundle_dir: Path, folder: Path, *, servers: Sequence[Server], keep: int) -> Published:
    """Makes the bundle the next version, in the repository and in the servers that serve it, one after the other.

    Raises:
        Fault: it does not load or not score as offline, its signature is another than the served one's, or a server
            can't be asked. Then the repository and all servers are as they were, but those that the fault names.
        Faults: files that differ from what was exported.
    """
    bundle = read_bundle(bundle_dir)
    with locked(folder) as repository:
        before = repository.current()
        _require_same_signature(repository, bundle)
        with repository.candidate(bundle_dir, bundle) as number:
            trials: Sequence[Server | None] = servers or (None,)
            for server in trials:
                with _trial(repository, server) as url:
                    _require_golden_scores(bundle_dir, bundle, url=url, tls=server.tls if server else None)
            repository.adopt(number)
        try:
            _swap(repository, number, servers=servers)
        except _Unrestored:
            raise  # what a server still runs stays
        except BaseException:
            repository.prune(keep=number)  # the new one alone: later it would pass for one that was served
            raise
        repository.prune(keep=keep)
        return Published(number, before, tuple(repository.versions()))


def rollback(folder: Path, *, servers: Sequence[Server]) -> Published:
    """Serves the version before the present one again, and removes the present one.

    Raises:
        Fault: there is none before, it does not load any more, or a server can't be asked; all stays as it was.
        Faults: files of it that were changed.
    """
    with locked(folder) as repository:
        before = repository.current()
        earlier = [number for number in repository.versions() if before is not None and number < before]
        if not earlier:
            got, remedy = f"versions {repository.versions()}, {before} is served", "publish the bundle you want"
            raise Fault(str(folder), got=got, wanted="a version before the served one", remedy=remedy)
        _require_same_signature(repository, read_bundle(repository.version(earlier[-1])))
        _swap(repository, earlier[-1], servers=servers)
        repository.prune(keep=len(earlier))
        return Published(earlier[-1], before, tuple(repository.versions()))


def _swap(repository: Repository, number: int, *, servers: Sequence[Server]) -> None:
    """Serves `number` from here on; all is as before where that fails."""
    before = repository.config()
    repository.serve(number)
    wanted = sha256(repository.version(number) / MARKER)
    try:
        for server in servers:
            with ModelControl(server) as control:
                control.load(MODEL)
                if control.served_bundle(MODEL, number) != wanted:
                    remedy = f"is {repository.folder} the repository of this server?"
                    raise Fault(server.url, got="another bundle", wanted=f"version {number}", remedy=remedy)
    except BaseException as error:
        if left := _restore(repository, before, servers=servers):
            got, remedy = f"servers that may run version {number}, after: {error}", "restart them"
            raise _Unrestored(", ".join(left), got=got, wanted="the version before", remedy=remedy) from error
        raise


class _Unrestored(Fault):
    """Some servers could not be brought back."""


def _restore(repository: Repository, before: pb.ModelConfig | None, *, servers: Sequence[Server]) -> list[str]:
    """All as it was; returns the addresses of the servers that could not be asked."""
    repository.restore(before)
    left = []
    for server in servers:  # where the old version still runs, this says that it is the wanted one
        try:
            with ModelControl(server) as control:
                control.unload(MODEL) if before is None else control.load(MODEL)
        except Fault:
            left.append(server.url)
    return left


@contextmanager
def _trial(repository: Repository, server: Server | None) -> Iterator[str]:
    """The address of a server where the candidate runs: the one that serves, or one for the trial alone."""
    if server is not None:
        with ModelControl(server) as control:
            try:
                control.load(CANDIDATE)
                yield server.url
            finally:
                with suppress(Fault):
                    control.unload(CANDIDATE)
        return
    with tempfile.TemporaryDirectory(prefix="rankforge-trial-") as logs:
        options = ServerOptions(repository=repository.folder, model=CANDIDATE, log_dir=Path(logs))
        with EmbeddedServer(options) as trial:
            yield trial.start().url


def _require_golden_scores(bundle_dir: Path, bundle: Bundle, *, url: str, tls: Path | None) -> None:
    with Client(url, CANDIDATE, tls=tls) as client:
        for compared in golden_comparisons(bundle_dir, bundle, client=client):
            if compared.equal != compared.rows:
                wanted, remedy = "every row as offline", "export the run again, and look at what changed since"
                raise Fault(str(bundle_dir), got=str(compared), wanted=wanted, remedy=remedy)


def _require_same_signature(repository: Repository, bundle: Bundle) -> None:
    """A client packs as the model that it met says, so another signature would read its columns as others."""
    config = repository.config()
    if config is None:
        return
    served = {"numbers_type": "FP64"} | json.loads(config.parameters["signature"].string_value)
    offered = json.loads(
        model_config(bundle, bundle_hash="", instances=1, version=1).parameters["signature"].string_value
    )
    if differ := sorted(name for name in served.keys() | offered.keys() if served.get(name) != offered.get(name)):
        got, wanted = f"another {', '.join(differ)} than the served version's", "requests that both understand"
        remedy = "serve it from a repository of its own and move the clients there"
        raise Fault(str(repository.folder), got=got, wanted=wanted, remedy=remedy)
