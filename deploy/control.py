"""Loading and unloading of models in a running server, for whoever holds its key."""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tritonclient.utils import InferenceServerException

from deploy.connect import connect
from etl.faults import Fault

_HEADER = "triton-grpc-protocol-admin"


@dataclass(frozen=True)
class Server:
    """Where a server is, and where the key of its model control lies. `load_timeout_s` bears a slow model."""

    url: str
    key_file: Path
    tls: Path | None = None
    load_timeout_s: float = 120.0


class ModelControl:
    """A connection to the model control of one server."""

    def __init__(self, server: Server) -> None:
        """Raises Fault where there is no key, or no address."""
        self._server = server
        self._headers = {_HEADER: _key(server.key_file)}
        try:
            self._client = connect(server.url, tls=server.tls)
        except InferenceServerException as error:
            raise self._fault("its address", error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def load(self, model: str) -> None:
        """Returns once the version that the model's config names takes requests; until then the one before does.

        Raises Fault with the server's reason where it does not load: the one before goes on.
        """
        try:
            self._client.load_model(model, headers=self._headers, client_timeout=self._server.load_timeout_s)
        except InferenceServerException as error:
            raise self._fault(f"model '{model}'", error) from None

    def unload(self, model: str) -> None:
        """Ends a model and its stubs; one that is not there is fine. Raises Fault where no server answers."""
        try:
            self._client.unload_model(model, headers=self._headers, client_timeout=self._server.load_timeout_s)
        except InferenceServerException as error:
            raise self._fault(f"model '{model}'", error) from None

    def served_bundle(self, model: str, version: int) -> str | None:
        """Hash of the bundle that this version serves; None where it takes no requests."""
        try:
            if not self._client.is_model_ready(model, str(version), client_timeout=self._server.load_timeout_s):
                return None
            config = self._client.get_model_config(model, str(version), client_timeout=self._server.load_timeout_s)
        except InferenceServerException:
            return None
        return str(config.config.parameters["bundle"].string_value)

    def _fault(self, what: str, error: InferenceServerException) -> Fault:
        message = str(error.message())
        remedy = "mend what it says, see the server's log"
        if "restricted" in message:
            remedy = f"is {self._server.key_file} the key of this server?"
        return Fault(f"{self._server.url}: {what}", got=message, wanted="a server that loads it", remedy=remedy)


def _key(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        wanted = "the key of a server that runs: 'deploy serve' writes it as admin.key beside its log"
        raise Fault(str(path), got=str(error), wanted=wanted, remedy="name it with --key-file") from None
