"""One launch of tritonserver: begun, and awaited until it answers on every port."""

import os
import re
import threading
import time
from concurrent.futures import Executor
from dataclasses import dataclass, field

from deploy.server.command import server_command, server_environment
from deploy.server.endpoint import Endpoint, ServerOptions
from deploy.server.folder import LogFolder
from deploy.server.log import read_since, reasons, size_bytes
from deploy.server.ports import Ports
from deploy.server.probe import unready
from deploy.server.process import ServerProcess
from deploy.server.runtime import Runtime
from etl.faults import Fault

_PROBE_EVERY_S = 0.05
_PORT_LOST = re.compile(r"Socket '[^']*' already in use")


@dataclass(frozen=True)
class Site:
    """What stays the same over the restarts of one server. `parent` has one thread, which lives as long."""

    options: ServerOptions
    runtime: Runtime
    folder: LogFolder
    ports: Ports
    server_id: str
    admin_key: str = field(repr=False)
    parent: Executor


class PortLost(Fault):
    """Another program began to listen on one of the ports after they were bound and before the server listened."""


def launch(site: Site, stop: threading.Event) -> tuple[ServerProcess, Endpoint]:
    """Returns once the server answers, or `stop` is set. Raises Fault with the log's reasons, leaving nothing alive."""
    log = site.folder.log
    offset = size_bytes(log)
    command = server_command(
        runtime=site.runtime,
        options=site.options,
        ports=site.ports,
        server_id=site.server_id,
        admin_key=site.admin_key,
    )
    environment = server_environment(site.runtime, os.environ)
    process = ServerProcess.begin(command, environment=environment, log=log, parent=site.parent)
    try:
        endpoint = _endpoint(site, process.pid)
        if failure := _await_ready(process, endpoint=endpoint, timeout_s=site.options.ready_timeout_s, stop=stop):
            raise _startup_fault(site, failure=failure, log_text=read_since(log, offset))
        if not stop.is_set():
            site.folder.write_state(endpoint)
    except BaseException:
        process.kill()
        raise
    return process, endpoint


def _endpoint(site: Site, pid: int) -> Endpoint:
    return Endpoint(
        server_id=site.server_id,
        model=site.options.model,
        host=site.options.host,
        grpc_port=site.ports.grpc,
        http_port=site.ports.http,
        metrics_port=site.ports.metrics,
        pid=pid,
        supervisor_pid=os.getpid(),
        tls=site.options.tls is not None,
        log=site.folder.log.absolute(),
        key_file=site.folder.key.absolute(),
    )


def _await_ready(process: ServerProcess, *, endpoint: Endpoint, timeout_s: float, stop: threading.Event) -> str | None:
    """None once the server is ready, or `stop` is set; otherwise what came instead."""
    end = time.monotonic() + timeout_s
    while not stop.wait(_PROBE_EVERY_S):
        if death := process.death():
            return death
        missing = unready(endpoint)
        if missing is None:
            return None
        if time.monotonic() > end:
            return f"no answer of {missing} within {timeout_s:g} s"
    return None


def _startup_fault(site: Site, *, failure: str, log_text: str) -> Fault:
    kind = PortLost if _PORT_LOST.search(log_text) else Fault
    return kind(
        str(site.folder.log),
        got=f"{failure}:\n{reasons(log_text)}\n",
        wanted=f"a server that loads model {site.options.model} and answers",
        remedy="mend what the log names, or allow a slow model a longer ready timeout",
    )
