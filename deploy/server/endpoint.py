"""What is asked of the embedded server, and where it then answers."""

from dataclasses import dataclass
from pathlib import Path

HOST = "127.0.0.1"


@dataclass(frozen=True)
class ServerOptions:
    """A port left at None is a free one, a state file left at None is `tritonserver.json` in the log folder.

    `max_restarts` deaths within `restart_window_s` are borne, one more is not.
    """

    repository: Path
    model: str
    log_dir: Path
    state: Path | None = None
    grpc_port: int | None = None
    http_port: int | None = None
    metrics_port: int | None = None
    ready_timeout_s: float = 120.0
    exit_timeout_s: int = 10
    max_restarts: int = 5
    restart_window_s: float = 300.0


@dataclass(frozen=True)
class Endpoint:
    """A server that answers. `pid` is tritonserver's and changes with a restart; ports and id stay."""

    server_id: str  # Triton's own --id, and what the names of its shared-memory regions begin with
    model: str
    host: str
    grpc_port: int
    http_port: int
    metrics_port: int
    pid: int
    supervisor_pid: int
    log: Path
