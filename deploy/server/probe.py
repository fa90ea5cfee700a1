"""What a server answers on its loopback ports. A probe closes its connections: an idle one holds the shutdown."""

import json
import socket
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import quote

import tritonclient.grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from deploy.server.endpoint import HOST, Endpoint

_TIMEOUT_S = 2.0
# A proxy of the environment is not asked for a loopback address, and no back-off is shared between probes.
_CHANNEL = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]


@dataclass(frozen=True)
class ReadyVersion:
    """A version of a model that takes requests, and how many stubs run it."""

    model: str
    version: str
    instances: int


def unready(endpoint: Endpoint) -> str | None:
    """The first thing that does not answer yet, or None.

    Triton calls itself ready over gRPC before the other two sockets listen, so each is asked; and it is asked for
    its id, since on a lost port another server may answer. Behind TLS gRPC is asked for a connection alone.
    """
    if _ask(endpoint.http_port, "/v2/health/ready") is None:
        return "HTTP"
    if endpoint.server_id.encode() not in (_ask(endpoint.http_port, "/v2") or b""):
        return "HTTP of this server"
    if _ask(endpoint.http_port, f"/v2/models/{quote(endpoint.model)}/ready") is None:
        return f"model {endpoint.model}"
    if _ask(endpoint.metrics_port, "/metrics") is None:
        return "metrics"
    answers = _listens(endpoint) if endpoint.tls else _grpc_answers(endpoint)
    return None if answers else "gRPC"


def ready_versions(endpoint: Endpoint, *, admin_key: str, models: Collection[str]) -> list[ReadyVersion] | None:
    """All versions of these models that take requests now; None where the server does not say."""
    try:
        index = _json(endpoint.http_port, "/v2/repository/index", method="POST", headers={"admin": admin_key})
        ready = [(each["name"], each["version"]) for each in index if each.get("state") == "READY"]
        return [
            ReadyVersion(name, version, _instances(endpoint, name, version=version))
            for name, version in ready
            if name in models
        ]
    except (ValueError, KeyError):
        return None


def _instances(endpoint: Endpoint, model: str, *, version: str) -> int:
    config = _json(endpoint.http_port, f"/v2/models/{quote(model)}/versions/{version}/config")
    return sum(group["count"] * max(1, len(group.get("gpus", ()))) for group in config["instance_group"])


def _json(port: int, path: str, *, method: str = "GET", headers: dict[str, str] | None = None) -> Any:
    """Raises ValueError where there is no answer, or none in JSON."""
    return json.loads(_ask(port, path, method=method, headers=headers) or b"")


def _ask(port: int, path: str, *, method: str = "GET", headers: dict[str, str] | None = None) -> bytes | None:
    connection = HTTPConnection(HOST, port, timeout=_TIMEOUT_S)
    try:
        connection.request(method, path, headers={"Connection": "close"} | (headers or {}))
        response = connection.getresponse()
        body = response.read()
        return body if response.status == 200 else None
    except (OSError, HTTPException):
        return None
    finally:
        connection.close()


def _listens(endpoint: Endpoint) -> bool:
    with suppress(OSError), socket.create_connection((endpoint.host, endpoint.grpc_port), timeout=_TIMEOUT_S):
        return True
    return False


def _grpc_answers(endpoint: Endpoint) -> bool:
    client = triton_grpc.InferenceServerClient(endpoint.url, channel_args=_CHANNEL)
    try:
        identity = client.get_server_metadata(client_timeout=_TIMEOUT_S)
        ready: bool = client.is_model_ready(endpoint.model, client_timeout=_TIMEOUT_S)
        return ready and identity.name == endpoint.server_id
    except InferenceServerException:
        return False
    finally:
        client.close()
