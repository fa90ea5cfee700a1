"""The stubs of a running server: which have died, told apart from those that Triton ended with their model."""

import time
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import psutil

from deploy.server.endpoint import Endpoint
from deploy.server.probe import ready_versions
from deploy.server.process import lives

_LOOK_EVERY_S = 1.0
_CONFIRM_AFTER_S = 0.2
_STUB = "triton_python_backend_stub"

_Version = tuple[str, str]


class StubWatch:
    """Triton neither restarts a dead stub nor calls its model unready, and a new version ends the old one's stubs.

    So whenever a stub appears or is gone, the server is asked which versions take requests: each needs all its stubs.
    Of models that are not among `models`, such as one on trial, nobody needs any.
    """

    def __init__(self, endpoint: Endpoint, *, admin_key: str, models: Collection[str]) -> None:
        self._endpoint, self._admin_key, self._models = endpoint, admin_key, models
        self._stubs = _stubs(endpoint.pid)
        self._looked_s = time.monotonic()

    def death(self) -> str | None:
        """Which version lacks a stub, or None."""
        if all(lives(stub) for stub in self._stubs) and time.monotonic() < self._looked_s + _LOOK_EVERY_S:
            return None
        before, self._stubs = self._stubs, _stubs(self._endpoint.pid)
        self._looked_s = time.monotonic()
        if self._stubs == before or not self._lacking():
            return None
        time.sleep(_CONFIRM_AFTER_S)  # of a version that is being ended, the answer and the stubs may differ
        self._stubs = _stubs(self._endpoint.pid)
        return self._lacking()

    def _lacking(self) -> str | None:
        ready = ready_versions(self._endpoint, admin_key=self._admin_key, models=self._models)
        if ready is None:
            return "a Python stub ended and the server does not say which versions are ready"
        alive = Counter(version for stub in self._stubs if (version := _version(stub)))
        for each in ready:
            if (count := alive[each.model, each.version]) < each.instances:
                return f"Python stub died: model {each.model} version {each.version} has {count} of {each.instances}"
        return None


def _stubs(server_pid: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return [child for child in psutil.Process(server_pid).children() if lives(child)]
    return []


def _version(stub: psutil.Process) -> _Version | None:
    """A stub runs `<repository>/<model>/<version>/model.py`."""
    with suppress(psutil.Error):
        line = stub.cmdline()
        if len(line) > 1 and Path(line[0]).name == _STUB:
            model, version, _ = Path(line[1]).parts[-3:]
            return model, version
    return None
