"""What the embedded server asks before it listens to others than this machine."""

import ipaddress
from pathlib import Path

from deploy.server.endpoint import ServerOptions
from etl.faults import Fault, Faults


def require_safe_bind(options: ServerOptions) -> None:
    """Raises Fault or Faults where the host is no address, an open one without a word, or TLS files are missing."""
    if faults := [*_host_faults(options), *_tls_faults(options.tls)]:
        raise Faults(faults)


def _host_faults(options: ServerOptions) -> list[Fault]:
    try:
        address = ipaddress.ip_address(options.host)
    except ValueError:
        remedy = "give the address of the interface to listen at"
        return [Fault("host", got=f"'{options.host}'", wanted="an IP address", remedy=remedy)]
    if address.is_loopback or options.public:
        return []
    wanted = "a loopback address: Triton 2.51 has known holes that a request from the network can use"
    remedy = "serve the repository on a current Triton (deploy/k8s), or say i_know = true where the network is closed"
    return [Fault("host", got=options.host, wanted=wanted, remedy=remedy)]


def _tls_faults(folder: Path | None) -> list[Fault]:
    if folder is None:
        return []
    missing = [folder / name for name in ("tls.crt", "tls.key") if not (folder / name).is_file()]
    wanted, remedy = "PEM files tls.crt and tls.key, and ca.crt for mutual TLS", "put them there"
    return [Fault(str(path), got="no such file", wanted=wanted, remedy=remedy) for path in missing]
