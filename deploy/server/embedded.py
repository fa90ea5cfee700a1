"""Starting, watching and stopping the embedded Triton server."""

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from deploy.server.endpoint import Endpoint, ServerOptions
from deploy.server.folder import claimed, log_folder
from deploy.server.launch import PortLost, Site, launch
from deploy.server.ports import held_ports
from deploy.server.process import ServerProcess, remove_regions
from deploy.server.public import require_safe_bind
from deploy.server.runtime import find_runtime
from deploy.server.stubs import StubWatch
from etl.faults import Fault

_log = logging.getLogger(__name__)
_STARTS = 3
_WATCH_EVERY_S = 0.1
_PAUSE_AFTER_FAILURE_S = 1.0
_EXIT_MARGIN_S = 5.0  # Triton looks at its exit timeout once a second, and unloads its models after it


@dataclass
class _Run:
    """A started server: the process changes with each restart, the site does not."""

    site: Site
    process: ServerProcess
    endpoint: Endpoint
    stubs: StubWatch

    @classmethod
    def begin(cls, site: Site, stop: threading.Event) -> "_Run":
        process, endpoint = launch(site, stop)
        models = (site.options.model, *site.options.others)
        return cls(site, process, endpoint, StubWatch(endpoint, admin_key=site.admin_key, models=models))

    def death(self) -> str | None:
        return self.process.death() or self.stubs.death()


class EmbeddedServer:
    """A tritonserver that lives no longer than its `with` block, nor than this process should that be killed.

    The methods are for one thread; only the event handed to `supervise` is set from elsewhere.
    """

    def __init__(self, options: ServerOptions) -> None:
        self._options = options
        self._run: _Run | None = None
        self._held = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, stop: threading.Event | None = None) -> Endpoint:
        """Returns once gRPC, HTTP, metrics and the model answer, or `stop` is set before they do.

        Raises Fault or Faults, all of them at once, where they can't.
        """
        stop = stop or threading.Event()
        if self._run is not None:
            raise RuntimeError("the server is started already")
        _require_model(self._options)
        require_safe_bind(self._options)
        for _ in range(_STARTS - 1):
            try:
                return self._start_once(stop)
            except PortLost as lost:
                _log.warning("%s: another program took a port, starting again", lost.place)
        return self._start_once(stop)

    def _start_once(self, stop: threading.Event) -> Endpoint:
        with ExitStack() as held:
            site = held.enter_context(_held_site(self._options))
            self._run = _Run.begin(site, stop)
            endpoint = self._run.endpoint
            self._held = held.pop_all()
        if not stop.is_set():
            _log.info("model %s answers at %s:%d (gRPC)", endpoint.model, endpoint.host, endpoint.grpc_port)
        return endpoint

    def supervise(self, stop: threading.Event) -> None:
        """Blocks until `stop` is set, restarting the server on its ports when it or one of its stubs dies.

        Raises Fault when it dies more often than the options bear.
        """
        if self._run is None:
            raise RuntimeError("the server is not started")
        budget = RestartBudget(self._options)
        failure: str | None = None
        while not stop.wait(_WATCH_EVERY_S):
            failure = failure or self._run.death()
            if failure is not None:
                if not budget.allows(time.monotonic()):
                    raise _hopeless(self._run.site, failure)
                failure = self._restart(self._run, failure=failure, stop=stop)

    def stop(self) -> None:
        """Lets requests in flight finish for `exit_timeout_s`, then kills. Nothing of the server stays behind."""
        run, self._run = self._run, None
        with self._held:
            if run is not None:
                exit_code = run.process.stop(self._options.exit_timeout_s + _EXIT_MARGIN_S)
                if exit_code != 0:
                    _log.warning("tritonserver ended with %d, see %s", exit_code, run.site.folder.log)

    def _restart(self, run: _Run, *, failure: str, stop: threading.Event) -> str | None:
        """None when the server answers again, or `stop` is set; otherwise why it does not."""
        _log.warning("%s: restarting the server", failure)
        began = time.monotonic()
        run.process.kill()  # with a stub dead there is nothing to drain: each request to it fails, after a second
        remove_regions(run.site.server_id)
        try:
            self._run = _Run.begin(run.site, stop)
        except Fault as fault:
            stop.wait(_PAUSE_AFTER_FAILURE_S)
            return str(fault)
        if not stop.is_set():
            _log.info("the server answers again after %.1f s", time.monotonic() - began)
        return None


class RestartBudget:
    """At most `max_restarts` within any `restart_window_s`."""

    def __init__(self, options: ServerOptions) -> None:
        self._options = options
        self._spent_s: deque[float] = deque()

    def allows(self, now_s: float) -> bool:
        """Whether one more restart is allowed at `now_s`; it is then spent."""
        while self._spent_s and self._spent_s[0] <= now_s - self._options.restart_window_s:
            self._spent_s.popleft()
        if len(self._spent_s) >= self._options.max_restarts:
            return False
        self._spent_s.append(now_s)
        return True


@contextmanager
def _held_site(options: ServerOptions) -> Iterator[Site]:
    runtime = find_runtime()
    server_id = f"rankforge-{secrets.token_hex(6)}-"
    with (
        claimed(log_folder(options), options.exit_timeout_s + _EXIT_MARGIN_S) as folder,
        held_ports(options) as ports,  # after a killed launcher's server, which may have had the same, was seen out
        ThreadPoolExecutor(max_workers=1, thread_name_prefix="triton-parent") as parent,
    ):
        admin_key = secrets.token_hex(16)
        folder.write_key(admin_key)
        try:
            yield Site(
                options=options,
                runtime=runtime,
                folder=folder,
                ports=ports,
                server_id=server_id,
                admin_key=admin_key,
                parent=parent,
            )
        finally:
            remove_regions(server_id)


def _require_model(options: ServerOptions) -> None:
    config = options.repository / options.model / "config.pbtxt"
    if not config.is_file():
        raise Fault(
            str(config),
            got="no such file",
            wanted=f"a Triton repository with model {options.model}",
            remedy="give the folder that holds the model's folder",
        )


def _hopeless(site: Site, failure: str) -> Fault:
    options = site.options
    return Fault(
        str(site.folder.log),
        got=f"{options.max_restarts} restarts within {options.restart_window_s:g} s, and then: {failure}",
        wanted="a server that stays up",
        remedy="see what the log says before each restart; a stub that ran out of memory says nothing there",
    )
