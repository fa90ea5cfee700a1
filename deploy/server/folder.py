"""The log folder of one server: its log, its state file, and the claim that keeps a second server out."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydantic import TypeAdapter, ValidationError

from deploy.server.endpoint import Endpoint, ServerOptions
from deploy.server.process import end_orphan, remove_regions
from etl.artifact import write_text
from etl.faults import Fault

_log = logging.getLogger(__name__)
_STATE = TypeAdapter(Endpoint)
KEY_FILE = "admin.key"


@dataclass(frozen=True)
class LogFolder:
    log: Path
    state: Path

    @property
    def key(self) -> Path:
        return self.log.with_name(KEY_FILE)

    def write_key(self, key: str) -> None:
        """The key of model control, for this user alone."""
        self.key.unlink(missing_ok=True)
        with os.fdopen(os.open(self.key, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(key)

    def write_state(self, endpoint: Endpoint) -> None:
        self.state.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.state, _STATE.dump_json(endpoint, indent=1).decode() + "\n")

    def read_state(self) -> Endpoint | None:
        """None where there is none, or one this version can't read."""
        try:
            return _STATE.validate_json(self.state.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None


def log_folder(options: ServerOptions) -> LogFolder:
    """Where the server's files are, by default in `log_dir`."""
    return LogFolder(
        log=options.log_dir / "tritonserver.log", state=options.state or options.log_dir / "tritonserver.json"
    )


@contextmanager
def claimed(folder: LogFolder, orphan_timeout_s: float) -> Iterator[LogFolder]:
    """Holds the folder for this process, and ends and sweeps what a killed one left. Raises Fault where it is taken."""
    with _open_log(folder.log) as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as taken:
            raise Fault(
                str(folder.log.parent),
                got=f"the folder of a server that runs ({folder.read_state() or 'starting'})",
                wanted="a log folder of its own for each server",
                remedy="stop that server, or give another folder",
            ) from taken
        if left := folder.read_state():
            _log.warning("%s: sweeping after a server whose launcher was killed", folder.state)
            end_orphan(left.pid, server_id=left.server_id, timeout_s=orphan_timeout_s)
            remove_regions(left.server_id)
        try:
            yield folder
        finally:
            folder.state.unlink(missing_ok=True)
            folder.key.unlink(missing_ok=True)


def _open_log(log: Path) -> BinaryIO:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        return log.open("ab")
    except OSError as error:
        raise Fault(
            str(log), got=str(error), wanted="a folder this user can write", remedy="give another folder"
        ) from error
