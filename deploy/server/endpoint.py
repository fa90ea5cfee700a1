"""What is asked of the embedded server, and where it then answers."""

from dataclasses import dataclass
from pathlib import Path

HOST = "127.0.0.1"


@dataclass(frozen=True)
class ServerOptions:
    """A port left at None is a free one, a state file left at None is `tritonserver.json` in the log folder.

    `others` are models of the repository that are served beside `model`. gRPC listens at `host`, an IP address that
    has to be a loopback one unless `public`; HTTP and metrics stay on the loopback interface. `tls` is a folder with
    `tls.crt` and `tls.key`; with a `ca.crt` in it gRPC clients need a certificate of that authority.
    `max_restarts` deaths within `restart_window_s` are borne, one more is not.
    """

    repository: Path
    model: str
    log_dir: Path
    others: tuple[str, ...] = ()
    host: str = HOST
    public: bool = False
    tls: Path | None = None
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
    tls: bool
    log: Path
    key_file: Path  # of model control; its owner alone can read it

    @property
    def url(self) -> str:
        """The gRPC address as seen from this machine."""
        host = {"0.0.0.0": HOST, "::": "::1"}.get(self.host, self.host)
        return f"[{host}]:{self.grpc_port}" if ":" in host else f"{host}:{self.grpc_port}"
