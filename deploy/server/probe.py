"""Whether a server answers on each of its ports. A probe closes its connections: an idle one holds the shutdown."""

from http.client import HTTPConnection, HTTPException
from urllib.parse import quote

import tritonclient.grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from deploy.server.endpoint import HOST, Endpoint

_TIMEOUT_S = 2.0
# A proxy of the environment is not asked for a loopback address, and no back-off is shared between probes.
_CHANNEL = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]


def unready(endpoint: Endpoint) -> str | None:
    """The first thing that does not answer yet, or None.

    Triton calls itself ready over gRPC before the other two sockets listen, so each is asked; and it is asked for
    its id, since on a lost port another server may answer.
    """
    if _get(endpoint.http_port, "/v2/health/ready") is None:
        return "HTTP"
    if endpoint.server_id.encode() not in (_get(endpoint.http_port, "/v2") or b""):
        return "HTTP of this server"
    if _get(endpoint.http_port, f"/v2/models/{quote(endpoint.model)}/ready") is None:
        return f"model {endpoint.model}"
    if _get(endpoint.metrics_port, "/metrics") is None:
        return "metrics"
    return None if _grpc_answers(endpoint) else "gRPC"


def _get(port: int, path: str) -> bytes | None:
    connection = HTTPConnection(HOST, port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        response = connection.getresponse()
        body = response.read()
        return body if response.status == 200 else None
    except (OSError, HTTPException):
        return None
    finally:
        connection.close()


def _grpc_answers(endpoint: Endpoint) -> bool:
    client = triton_grpc.InferenceServerClient(f"{endpoint.host}:{endpoint.grpc_port}", channel_args=_CHANNEL)
    try:
        identity = client.get_server_metadata(client_timeout=_TIMEOUT_S)
        ready: bool = client.is_model_ready(endpoint.model, client_timeout=_TIMEOUT_S)
        return ready and identity.name == endpoint.server_id
    except InferenceServerException:
        return False
    finally:
        client.close()
