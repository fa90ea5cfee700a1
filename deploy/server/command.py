"""The command line and the environment of tritonserver."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from deploy.server.endpoint import HOST, ServerOptions
from deploy.server.ports import Ports
from deploy.server.runtime import Runtime

# "model-config" is not among them: the client reads the request signature from the model's config parameters.
_CLOSED = "shared-memory,model-repository,statistics,trace,logging"


def server_command(
    *, runtime: Runtime, options: ServerOptions, ports: Ports, server_id: str, admin_key: str
) -> tuple[str, ...]:
    """tritonserver with everything but inference, health and the models' configs behind `admin_key`."""
    return (
        str(runtime.executable),
        f"--id={server_id}",
        f"--model-repository={options.repository.absolute()}",
        "--model-control-mode=explicit",
        *(f"--load-model={model}" for model in (options.model, *options.others)),
        "--disable-auto-complete-config",
        "--strict-readiness=true",
        f"--exit-timeout-secs={options.exit_timeout_s}",
        "--allow-vertex-ai=false",  # AIP_MODE=PREDICTION would turn it on, on every interface,
        "--allow-grpc=true",  # and these two off
        "--allow-http=true",
        "--allow-sagemaker=false",
        f"--grpc-address={options.host}",
        f"--grpc-port={ports.grpc}",
        f"--grpc-restricted-protocol={_CLOSED}:admin={admin_key}",
        *_tls(options.tls),
        f"--http-address={HOST}",
        f"--http-port={ports.http}",
        f"--http-restricted-api={_CLOSED}:admin={admin_key}",
        f"--metrics-address={HOST}",
        f"--metrics-port={ports.metrics}",
        "--allow-gpu-metrics=false",
        f"--backend-directory={runtime.backends}",
        f"--backend-config=python,shm-region-prefix-name={server_id}",
    )


def _tls(folder: Path | None) -> tuple[str, ...]:
    if folder is None:
        return ()
    authority = folder / "ca.crt"
    own = (f"--grpc-server-cert={folder / 'tls.crt'}", f"--grpc-server-key={folder / 'tls.key'}")
    if authority.is_file():
        return ("--grpc-use-ssl-mutual=true", f"--grpc-root-cert={authority}", *own)
    return ("--grpc-use-ssl=true", *own)


def server_environment(runtime: Runtime, environment: Mapping[str, str]) -> dict[str, str]:
    """The stub finds this Python's packages by PATH alone; PYTHONPATH and PYTHONHOME could name another's."""
    kept = {name: value for name, value in environment.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    path = (str(Path(sys.executable).parent), environment.get("PATH", os.defpath))
    libraries = (runtime.library_path, environment.get("LD_LIBRARY_PATH", ""))
    return kept | {
        "PATH": os.pathsep.join(path),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
        "PYTHONDONTWRITEBYTECODE": "1",  # the repository may be read-only, and is never written to
        "OMP_NUM_THREADS": "1",  # one thread an instance: OpenMP's spinning threads cost several times the model
        "MALLOC_MMAP_THRESHOLD_": str(16 << 20),  # the buffers of a request come from memory that is kept: else the
        "MALLOC_TRIM_THRESHOLD_": str(64 << 20),  # kernel gives, clears and takes back each of them
    }
