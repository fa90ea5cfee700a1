"""Where a server listens and by which certificates: a small TOML file of the machine, not of the experiment."""

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deploy.server import HOST
from etl.faults import Fault, Faults


class Network(BaseModel):
    """The keys of the file; without one a server listens on the loopback interface, in plain text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(HOST, description="IP address for gRPC; HTTP and metrics stay on the loopback interface")
    i_know: bool = Field(False, description="allow a host that others can reach, on a Triton with known holes")
    tls: Path | None = Field(None, description="folder with tls.crt, tls.key, and ca.crt for mutual TLS")


def read_network(path: Path) -> Network:
    """`tls` is relative to the file. Raises Fault or Faults where it is missing or says something else."""
    remedy = f"write any of {', '.join(Network.model_fields)}"
    try:
        network = Network.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        places = [(".".join(map(str, each["loc"])), each["msg"]) for each in error.errors()]
        raise Faults(
            [Fault(f"{path}: {key}", got=got, wanted="a key as described", remedy=remedy) for key, got in places]
        ) from None
    except (OSError, ValueError) as error:
        raise Fault(str(path), got=str(error), wanted="a TOML file", remedy=remedy) from None
    return network.model_copy(update={"tls": network.tls and path.parent.resolve() / network.tls})
