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

from torch._C._distributed_c10d import Store

COME_WITHIN_S = 600.0
_BEATS_OF_SILENCE = 8
_LONGEST_BEAT_S = 2.0
_BEATS_TO_TELL = 3
_ENDED, _DONE = "ended", "done"


class Alive:
    """The beat of this rank, and the ear for the next one. Ends this process where the next one has been silent."""

    def __init__(self, store: Store, *, rank: int, size: int, keeper: str, dead_after_s: float) -> None:
        """`store` is a connection of its own, since who waits for an answer holds it; `keeper` says where it lies."""
        self._store, self._rank, self._size, self._keeper = store, rank, size, keeper
        self._dead_after_s, self._beat_s = dead_after_s, min(dead_after_s / _BEATS_OF_SILENCE, _LONGEST_BEAT_S)
        self._names = {rank: f"rank {rank} on {socket.gethostname()} (process {os.getpid()})"}
        self._store.set(f"name-{rank}", self._names[rank])
        self._stop, self._parent = threading.Event(), os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        # in beats of `_watch`: while this process does not get to run, as at a long import, nobody is silent
        self._unreached = self._unheard = 0
        self._neighbour, self._came, self._word = (rank + 1) % size, False, ""
        self._leaving = False
        # the store's answer may never come: who waits for it cannot watch
        self._beating = threading.Thread(target=self._beat, name="alive-beat", daemon=True)
        self._beating.start()
        threading.Thread(target=self._watch, name="alive-watch", daemon=True).start()

    @property
    def name(self) -> str:
        """This process, as messages call it."""
        return self._names[self._rank]

    def stop(self) -> None:
        """No more beats: this rank ends in good order."""
        self._stop.set()
        self._beating.join(self._dead_after_s)

    def say_ended(self, why: str) -> None:
        """Tells the others that a rank ends, and why; the first word stands. Waits for a few beats at most."""
        self._leaving = True
        teller = threading.Thread(target=self._tell, args=(why,), name="alive-tell", daemon=True)
        teller.start()
        teller.join(_BEATS_TO_TELL * self._beat_s)

    def linger(self) -> None:
        """Until the others had the time to read what was said: for the rank that keeps the store."""
        time.sleep((_BEATS_TO_TELL + 1) * self._beat_s)

    def who_ended(self) -> str:
        """Waits for a few beats, then repeats who said so, or names who has not been heard since; empty: nobody."""
        self._leaving = True
        try:
            before = [self._count(rank) for rank in range(self._size)]
            for _ in range(_BEATS_TO_TELL):
                time.sleep(self._beat_s)
                if word := self._ended():
                    return word
            after = [self._count(rank) for rank in range(self._size)]
            still = [self._name(rank) for rank in range(self._size) if before[rank] == after[rank]]
        except RuntimeError:
            return self._lost_store()
        return f"{', '.join(still)} ended without a word" if still else ""

    def _beat(self) -> None:
        count, heard = 0, b""
        while not self._stop.is_set():
            with contextlib.suppress(RuntimeError):  # the store is away: `_watch` sees for how long
                count += 1
                self._store.set(f"beat-{self._rank}", str(count))
                before, heard = heard, self._count(self._neighbour)
                self._word = self._ended()
                self._name(0), self._name(self._neighbour)  # to be known where nobody can be asked any more
                self._unreached = 0
                if heard != before or heard == _DONE.encode():
                    self._unheard, self._came = 0, True
            self._stop.wait(self._beat_s)
        with contextlib.suppress(RuntimeError):
            self._store.set(f"beat-{self._rank}", _DONE)

    def _watch(self) -> None:
        while not self._stop.wait(self._beat_s):
            self._unreached, self._unheard = self._unreached + 1, self._unheard + 1
            patience_s = self._dead_after_s if self._came else COME_WITHIN_S
            if self._word and not self._leaving:  # else the main thread is about to say it itself
                self._end(self._word)
            if self._parent not in (None, os.getppid()):  # nobody would end it, and the next start takes its run folder
                self._end(f"the torchrun of {self.name} ended")
            if self._unreached * self._beat_s > self._dead_after_s:
                self._end(self._lost_store())
            if self._unheard * self._beat_s > patience_s:
                what = "been silent for" if self._came else "not come within"
                self._end(f"{self._names.get(self._neighbour, f'rank {self._neighbour}')} has {what} {patience_s:g} s")

    def _end(self, why: str) -> None:
        """The main thread may be deep in a collective that never returns: no exception reaches it."""
        sys.stderr.write(f"{self.name} ends, since {why}\n")
        sys.stderr.flush()
        self.say_ended(why)
        os._exit(1)

    def _tell(self, why: str) -> None:
        with contextlib.suppress(RuntimeError):
            self._store.compare_set(_ENDED, "", why)

    def _ended(self) -> str:
        return self._read(_ENDED).decode()

    def _count(self, rank: int) -> bytes:
        return self._read(f"beat-{rank}")

    def _name(self, rank: int) -> str:
        if rank not in self._names and (name := self._read(f"name-{rank}")):
            self._names[rank] = name.decode()
        return self._names.get(rank, f"rank {rank}")

    def _read(self, key: str) -> bytes:
        return self._store.get(key) if self._store.check([key]) else b""

    def _lost_store(self) -> str:
        return f"the store at {self._keeper}{self._names.get(0, 'rank 0')}, does not answer"
