"""The user's faults: what every command reports in the same four words and exits with code 2."""

import contextlib
import errno
import signal
import sys
from collections.abc import Iterator, Sequence

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class Fault(Exception):
    """Something the user can mend. The message names the place, what came, what was wanted and the remedy."""

    def __init__(self, place: str, *, got: str, wanted: str, remedy: str) -> None:
        self.place, self.got, self.wanted, self.remedy = place, got, wanted, remedy
        super().__init__(f"{place}: got {got}; wanted {wanted}; remedy: {remedy}")


class Faults(Exception):
    """Several faults found in one pass, reported together."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(str(fault) for fault in self.faults))


@contextlib.contextmanager
def exit_on_fault() -> Iterator[None]:
    """Ends a command with the faults on stderr and exit code 2, without a traceback; what the system refuses is one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno not in _NO_SPACE:
            raise  # of the network, or of a reader of the output that has gone: no path is at fault
        sys.stderr.write(f"{_of_system(error)}\n")
        raise SystemExit(2) from None
    except (Fault, Faults) as faults:
        sys.stderr.write(f"{faults}\n")
        raise SystemExit(2) from None


def _of_system(error: OSError) -> Fault:
    places = [str(name) for name in (error.filename, error.filename2) if name is not None]
    remedy = "check the path, its permissions, and the space on the disk"
    got, wanted = error.strerror or str(error), "a place that can be read and written"
    return Fault(" to ".join(places) or "the system", got=got, wanted=wanted, remedy=remedy)


@contextlib.contextmanager
def exit_on_termination() -> Iterator[None]:
    """SIGTERM ends the command as an exception does: what it has begun to write is removed."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
