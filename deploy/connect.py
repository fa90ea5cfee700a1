"""A gRPC connection to a Triton server, plain or with TLS."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import grpc
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio

from etl.faults import Fault

_CHANNEL = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 300),  # a server that was started again is found at once
]


class _Tls(TypedDict, total=False):
    ssl: bool
    root_certificates: str
    private_key: str | None
    certificate_chain: str | None


def connect(url: str, *, tls: Path | None) -> triton_grpc.InferenceServerClient:
    """`tls` is a folder with `ca.crt`, and with `tls.crt` and `tls.key` where the server asks for a certificate.

    Raises:
        Fault: no ca.crt there.
        InferenceServerException: no address.
    """
    return triton_grpc.InferenceServerClient(url, channel_args=_CHANNEL, **_tls(tls))


def connect_async(url: str, *, tls: Path | None) -> triton_grpc_aio.InferenceServerClient:
    """The same for asyncio, inside of a running loop."""
    return triton_grpc_aio.InferenceServerClient(url, channel_args=_CHANNEL, **_tls(tls))


def channel_to(url: str, *, tls: Path | None, options: Sequence[tuple[str, int]]) -> grpc.Channel:
    """A bare channel, for whoever writes requests of their own. Raises Fault as `connect`."""
    given = _tls(tls)
    if not given:
        return grpc.insecure_channel(url, options=options)
    files = (given["root_certificates"], given["private_key"], given["certificate_chain"])
    credentials = grpc.ssl_channel_credentials(*(Path(file).read_bytes() if file else None for file in files))
    return grpc.secure_channel(url, credentials, options=options)


def _tls(folder: Path | None) -> _Tls:
    if folder is None:
        return {}
    authority, certificate, key = (folder / name for name in ("ca.crt", "tls.crt", "tls.key"))
    if not authority.is_file():
        wanted, remedy = "the PEM certificate of the authority that signed the server's", "put it there"
        raise Fault(str(authority), got="no such file", wanted=wanted, remedy=remedy)
    own = certificate.is_file() and key.is_file()
    return {
        "ssl": True,
        "root_certificates": str(authority),
        "private_key": str(key) if own else None,
        "certificate_chain": str(certificate) if own else None,
    }
