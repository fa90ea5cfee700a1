"""The log folder of one server: its log, its state, and the claim that keeps a second server out."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydantic import TypeAdapter, ValidationError

from deploy.server.endpoint import Endpoint
from deploy.server.process import end_orphan, remove_regions
from etl.faults import Fault

_log = logging.getLogger(__name__)
_STATE = TypeAdapter(Endpoint)


@dataclass(frozen=True)
class LogFolder:
    log: Path
    state: Path

    def write_state(self, endpoint: Endpoint) -> None:
        """Whole or not at all: beside it first, then renamed."""
        beside = self.state.with_suffix(".tmp")
        with beside.open("wb") as file:
            file.write(_STATE.dump_json(endpoint, indent=2))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.state)

    def read_state(self) -> Endpoint | None:
        """None where there is none, or one this version can't read."""
        try:
            return _STATE.validate_json(self.state.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None


@contextmanager
def claimed(path: Path, orphan_timeout_s: float) -> Iterator[LogFolder]:
    """Holds the folder for this process, and ends and sweeps what a killed one left. Raises Fault where it is taken."""
    folder = LogFolder(log=path / "tritonserver.log", state=path / "tritonserver.json")
    with _open_log(folder.log) as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as taken:
            raise Fault(
                str(path),
                got=f"the folder of a server that runs ({folder.read_state() or 'starting'})",
                wanted="a log folder of its own for each server",
                remedy="stop that server, or give another folder",
            ) from taken
        if left := folder.read_state():
            _log.warning("%s: sweeping after a server whose launcher was killed", folder.state)
            end_orphan(left.pid, left.server_id, orphan_timeout_s)
            remove_regions(left.server_id)
        try:
            yield folder
        finally:
            folder.state.unlink(missing_ok=True)


def _open_log(log: Path) -> BinaryIO:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        return log.open("ab")
    except OSError as error:
        raise Fault(
            str(log), got=str(error), wanted="a folder this user can write", remedy="give another folder"
        ) from error
