"""Keys in hash tables, one key after another in compiled code: numpy takes three times as long for a lookup.

Lookups and counts release the GIL.
"""

import numpy as np
import numpy.typing as npt

from etl.engines.native import call
from etl.lookup import NO_KEY, Int64s, Vocabulary


class CompiledVocabulary(Vocabulary):
    """Finds the same rows as the served one."""

    def __init__(self, keys: Int64s, rows: Int64s) -> None:
        self._slots = _filled(keys, rows, bits=(2 * len(keys)).bit_length())

    def __call__(self, keys: Int64s) -> Int64s:
        """Rows of the keys, of the same shape; 0 where unseen or missing."""
        rows = np.empty(keys.size, np.int64)
        self.into(rows, np.ascontiguousarray(keys.reshape(-1)))
        return rows.reshape(keys.shape)

    def into(self, rows: Int64s, keys: Int64s) -> tuple[int, int]:
        """The same of keys [B] into rows [B]; counts missing keys and rows 0."""
        sizes = np.array([len(self._slots), len(keys), 0, 0])
        call("look_up", self._slots, keys, rows, sizes)
        return int(sizes[2]), int(sizes[3])


class Counter:
    """How often each of the keys came; the reserved ones may not."""

    def __init__(self) -> None:
        self._slots, self._free = _empty(10), 1 << 9

    def add(self, keys: Int64s) -> None:
        keys = np.ascontiguousarray(keys)
        while len(keys):
            sizes = np.array([len(self._slots), len(keys), self._free, 0])
            call("count", self._slots, keys, sizes)
            self._free, keys = int(sizes[2]), keys[sizes[3] :]
            if len(keys):
                self._grow()

    def counts(self) -> tuple[Int64s, Int64s]:
        """The keys in any order, and their counts."""
        taken: npt.NDArray[np.bool_] = self._slots[:, 0] != NO_KEY
        return self._slots[taken, 0], self._slots[taken, 1]

    def _grow(self) -> None:
        keys, counts = self.counts()
        self._slots = _filled(keys, counts, bits=len(self._slots).bit_length() + 1)
        self._free = len(self._slots) // 2 - len(keys)


def _filled(keys: Int64s, values: Int64s, *, bits: int) -> Int64s:
    """So many slots, as a power of two, that hold the keys."""
    slots = _empty(bits)
    call("put", slots, *(np.ascontiguousarray(column) for column in (keys, values)), np.array([len(slots), len(keys)]))
    return slots


def _empty(bits: int) -> Int64s:
    slots = np.empty((1 << max(bits, 1), 2), np.int64)  # not zeros: numpy asks for huge pages here alone
    slots[:] = NO_KEY, 0
    return slots
