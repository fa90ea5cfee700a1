"""One tritonserver with its stubs: begun, looked at, ended."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Executor
from contextlib import suppress
from pathlib import Path

import psutil

_BOUND_EXEC = Path(__file__).with_name("bound_exec.py")
_SHARED_MEMORY = Path("/dev/shm")
_KILLED_TIMEOUT_S = 10.0
_POLL_S = 0.02


class ServerProcess:
    """tritonserver at the head of its own process group; the stubs are its children."""

    def __init__(self, popen: "subprocess.Popen[bytes]") -> None:
        self._popen = popen
        self._ended = False  # the group's number may then be given to others

    @classmethod
    def begin(
        cls, command: tuple[str, ...], *, environment: Mapping[str, str], log: Path, parent: Executor
    ) -> "ServerProcess":
        """Starts `command` from a thread of `parent`, whose end is the end of the server too."""
        bound = (sys.executable, "-I", "-S", str(_BOUND_EXEC), str(os.getpid()), *command)

        def popen() -> "subprocess.Popen[bytes]":
            with log.open("ab") as output:
                return subprocess.Popen(
                    bound,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )

        return cls(parent.submit(popen).result())

    @property
    def pid(self) -> int:
        return self._popen.pid

    def death(self) -> str | None:
        """How tritonserver ended, or None."""
        exit_code = self._popen.poll()
        return None if exit_code is None else f"tritonserver {self.pid} ended with {exit_code}"

    def stop(self, timeout_s: float) -> int:
        """SIGTERM, then SIGKILL for what lives after `timeout_s`. Returns the exit code, 0 where all went well."""
        self._popen.terminate()
        try:
            with suppress(subprocess.TimeoutExpired):
                self._popen.wait(timeout_s)
        finally:  # an impatient Ctrl-C leaves nothing behind either
            exit_code = self.kill()
        return exit_code

    def kill(self) -> int:
        """SIGKILL to the whole group; returns once nothing of it lives. Once ended it stays so."""
        if not self._ended:
            members = _members(self.pid)
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._popen.wait()
            self._ended = _await_end(members, _KILLED_TIMEOUT_S)
        return self._popen.wait()


def end_orphan(pid: int, *, server_id: str, timeout_s: float) -> None:
    """Sees a server out whose launcher was killed: it has had SIGTERM, and gets SIGKILL after `timeout_s`."""
    with suppress(psutil.Error, ProcessLookupError):
        if f"--id={server_id}" not in psutil.Process(pid).cmdline():
            return  # ended, its pid perhaps another's by now
        members = _members(pid)
        if not _await_end(members, timeout_s):
            os.killpg(pid, signal.SIGKILL)
            _await_end(members, _KILLED_TIMEOUT_S)


def remove_regions(server_id: str) -> None:
    """Removes the shared memory that killed stubs of this server left behind; call it when none lives."""
    for region in _SHARED_MEMORY.glob(f"{server_id}*"):
        region.unlink(missing_ok=True)


def _members(group: int) -> list[psutil.Process]:
    members = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError):
            if os.getpgid(process.pid) == group:
                members.append(process)
    return members


def _await_end(processes: list[psutil.Process], timeout_s: float) -> bool:
    end = time.monotonic() + timeout_s
    while any(lives(process) for process in processes):
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_S)
    return True


def lives(process: psutil.Process) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
