"""Notices ranks that vanished, and names them: each rank counts up a number in a store, and looks at its neighbour's.

A killed process closes its connections, and collectives of the others fail at once; this is to say who it was. A host
that lost its power or its network closes nothing: the others would wait for minutes inside a collective.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, TCPStore

_BEATS_OF_SILENCE = 8
_ENDED, _DONE = "ended", b"done"


def own_name(rank: int) -> str:
    """This process, as messages call it."""
    return f"rank {rank} on {socket.gethostname()} (process {os.getpid()})"


class Alive:
    """The beat of this rank, and the ear for the next one. Ends this process where the next one has been silent."""

    def __init__(self, rank: int, *, names: Sequence[str], run: str, dead_after_s: float) -> None:
        """`run` is the same word on all ranks, and another one whenever they gather anew."""
        self._rank, self._names, self._dead_after_s = rank, names, dead_after_s
        self._beat_s = dead_after_s / _BEATS_OF_SILENCE
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._server = f"{host}:{port}"
        patience = timedelta(seconds=dead_after_s)
        tcp = TCPStore(host, port, is_master=False, timeout=patience, wait_for_workers=False)
        self._store = PrefixStore(f"alive-{run}", tcp)
        self._stop = threading.Event()
        self._reached_s = self._heard_s = time.monotonic()
        self._word = ""
        for task in (self._beat, self._watch):  # the store's answer may never come: who waits for it cannot watch
            threading.Thread(target=task, name=f"alive{task.__name__}", daemon=True).start()

    def stop(self) -> None:
        """No more beats: this rank ends in good order."""
        self._stop.set()
        with contextlib.suppress(RuntimeError):
            self._store.set(self._key(self._rank), _DONE.decode())

    def say_ended(self, why: str) -> None:
        """Tells the others that a rank ends, and why; the first word stands."""
        with contextlib.suppress(RuntimeError):
            self._store.compare_set(_ENDED, "", why)

    def who_ended(self) -> str:
        """Waits for a few beats, then repeats who said so, or names who has not been heard since."""
        try:
            before = [self._count(rank) for rank in range(len(self._names))]
            for _ in range(3):
                time.sleep(self._beat_s)
                if word := self._ended():
                    return word
            after = [self._count(rank) for rank in range(len(self._names))]
        except RuntimeError:
            return self._lost_store()
        still = [name for name, a, b in zip(self._names, before, after, strict=True) if a == b]
        return f"{', '.join(still)} ended without a word" if still else "a connection broke, though all ranks live"

    def _beat(self) -> None:
        count, heard, neighbour = 0, b"", (self._rank + 1) % len(self._names)
        while not self._stop.is_set():
            with contextlib.suppress(RuntimeError):  # the store is away: `_watch` sees for how long
                count += 1
                self._store.set(self._key(self._rank), str(count))
                before, heard = heard, self._count(neighbour)
                self._word = self._ended()
                self._reached_s = time.monotonic()
                if heard != before or heard == _DONE:
                    self._heard_s = self._reached_s
            self._stop.wait(self._beat_s)

    def _watch(self) -> None:
        while not self._stop.wait(self._beat_s):
            now = time.monotonic()
            if self._word:
                self._end(self._word)
            if now - self._reached_s > self._dead_after_s:
                self._end(self._lost_store())
            if now - self._heard_s > self._dead_after_s:
                silent = self._names[(self._rank + 1) % len(self._names)]
                word = f"{silent} has been silent for {self._dead_after_s:g} s"
                self.say_ended(word)
                self._end(word)

    def _end(self, why: str) -> None:
        """The main thread may be deep in a collective that never returns: no exception reaches it."""
        sys.stderr.write(f"{self._names[self._rank]} ends, since {why}\n")
        sys.stderr.flush()
        os._exit(1)

    def _ended(self) -> str:
        return self._store.get(_ENDED).decode() if self._store.check([_ENDED]) else ""

    def _count(self, rank: int) -> bytes:
        key = self._key(rank)
        return self._store.get(key) if self._store.check([key]) else b""

    def _key(self, rank: int) -> str:
        return f"beat-{rank}"

    def _lost_store(self) -> str:
        return f"the store at {self._server}, on the host of rank 0 or of its torchrun, does not answer"
