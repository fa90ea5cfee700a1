"""A gRPC connection to a Triton server, plain or with TLS."""

from pathlib import Path

import tritonclient.grpc as triton_grpc

from etl.faults import Fault

_CHANNEL = [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", -1)]


def connect(url: str, *, tls: Path | None) -> triton_grpc.InferenceServerClient:
    """`tls` is a folder with `ca.crt`, and with `tls.crt` and `tls.key` where the server asks for a certificate.

    Raises:
        Fault: no ca.crt there.
        InferenceServerException: no address.
    """
    if tls is None:
        return triton_grpc.InferenceServerClient(url, channel_args=_CHANNEL)
    authority, certificate, key = (tls / name for name in ("ca.crt", "tls.crt", "tls.key"))
    if not authority.is_file():
        wanted, remedy = "the PEM certificate of the authority that signed the server's", "put it there"
        raise Fault(str(authority), got="no such file", wanted=wanted, remedy=remedy)
    own = certificate.is_file() and key.is_file()
    return triton_grpc.InferenceServerClient(
        url,
        ssl=True,
        root_certificates=str(authority),
        private_key=str(key) if own else None,
        certificate_chain=str(certificate) if own else None,
        channel_args=_CHANNEL,
    )
