"""Keys in hash tables, one key after another in compiled code: numpy takes three times as long for a lookup.

A table is int64 [slots, 2], the key and what belongs to it side by side: a search meets one line of the cache. Probing
is linear, NO_KEY marks a free slot, and at most half of the slots are taken. Lookups and counts release the GIL. Where
a table is larger than the cache they ask for the lines of the keys ahead, which takes a third off their time.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import llvmlite.ir as ir
import numba
import numpy as np
import numpy.typing as npt
from numba.core import cgutils
from numba.extending import intrinsic

from etl.lookup import MISSING_KEY, NO_KEY, Int64s, Vocabulary

Loop = TypeVar("Loop", bound=Callable[..., Any])

_FREE, _AHEAD = NO_KEY, 16
_CACHED = 1 << 16  # slots that the processor's cache holds without being asked
_inline: Callable[[Loop], Loop] = numba.njit(inline="always")  # a call counts references: four times a lookup's time
_SLOTS, _KEYS = numba.int64[:, ::1], numba.types.Array(numba.int64, 1, "C", readonly=True)
_PAIR = numba.types.UniTuple(_KEYS, 2)


def compiled(*types: numba.types.Type) -> Callable[[Loop], Loop]:
    """A loop of these types, compiled at its first import; kept on disk for the next process where that can be written.

    What divides by zero is infinite, as numpy has it.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}

    def made(loop: Loop) -> Loop:
        try:
            kept: Loop = numba.njit(types, cache=True, **options)(loop)
        except RuntimeError:  # neither the package's folder nor the user's can be written
            kept = numba.njit(types, **options)(loop)
        return kept

    return made


@intrinsic  # type: ignore[untyped-decorator]
def _prefetch(_: Any, slot: Any) -> Any:
    """Asks for the cache's line of (slots, at), without waiting for it."""

    def generate(context: Any, builder: Any, *of: Any) -> Any:
        signature, values = of
        slots, at = cgutils.unpack_tuple(builder, values[0])
        first = context.make_array(signature.args[0].types[0])(context, builder, slots).data
        place = builder.gep(first, [builder.shl(at, ir.Constant(ir.IntType(64), 1))])
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number])
        call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        to_read, keep, data = (ir.Constant(number, value) for value in (0, 3, 1))
        builder.call(call, [builder.bitcast(place, cgutils.voidptr_t), to_read, keep, data])
        return context.get_dummy_value()

    return numba.void(slot), generate


@_inline
def _home(slots: Int64s, key: np.int64) -> np.uint64:
    """The slot where a key's search begins."""
    z = np.uint64(key) + np.uint64(0x9E3779B97F4A7C15)  # as `etl.lookup.mix`
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) & np.uint64(len(slots) - 1)


@_inline
def _ask(slots: Int64s, key: np.int64) -> None:
    """The slot of a later key is on its way to the cache from now on."""
    if len(slots) > _CACHED:
        _prefetch((slots, _home(slots, key)))


@_inline
def _slot(slots: Int64s, key: np.int64) -> np.uint64:
    """Where the key stands, or the free slot where it would."""
    at = _home(slots, key)
    while slots[at, 0] != key and slots[at, 0] != _FREE:
        at = (at + np.uint64(1)) & np.uint64(len(slots) - 1)
    return at


@compiled(_SLOTS, _PAIR)
def _put(slots: Int64s, entries: tuple[Int64s, Int64s]) -> None:
    keys, values = entries
    for i in range(len(keys)):
        if i + _AHEAD < len(keys):
            _ask(slots, keys[i + _AHEAD])
        at = _slot(slots, keys[i])
        slots[at, 0], slots[at, 1] = keys[i], values[i]


@compiled(_SLOTS, numba.types.Tuple((_KEYS, numba.int64[::1])))
def _look_up(slots: Int64s, columns: tuple[Int64s, Int64s]) -> tuple[int, int]:
    """Writes the row of each key, and counts missing keys and rows 0."""
    keys, rows = columns
    missing = zeros = 0
    for i in range(len(keys)):
        if i + _AHEAD < len(keys):
            _ask(slots, keys[i + _AHEAD])
        at = _slot(slots, keys[i])
        rows[i] = slots[at, 1] if slots[at, 0] == keys[i] else 0
        missing += keys[i] == MISSING_KEY
        zeros += rows[i] == 0
    return missing, zeros


@compiled(numba.types.Tuple((_SLOTS, numba.int64)), _KEYS)
def _count(table: tuple[Int64s, int], keys: Int64s) -> tuple[int, int]:
    """Counts keys while new ones may take a slot, of so many: how many keys it counted, and the slots that are left."""
    slots, free = table
    for i in range(len(keys)):
        if i + _AHEAD < len(keys):
            _ask(slots, keys[i + _AHEAD])
        at = _slot(slots, keys[i])
        if slots[at, 0] == _FREE:
            if not free:
                return i, 0
            slots[at, 0] = keys[i]
            free -= 1
        slots[at, 1] += 1
    return len(keys), free


def _empty(bits: int) -> Int64s:
    slots = np.empty((1 << bits, 2), np.int64)  # not zeros: numpy asks for huge pages here alone
    slots[:] = _FREE, 0
    return slots


class CompiledVocabulary(Vocabulary):
    """Finds the same rows as the served one."""

    def __init__(self, keys: Int64s, rows: Int64s) -> None:
        self._slots = _empty(max(1, (2 * len(keys)).bit_length()))
        _put(self._slots, (keys, rows))

    def __call__(self, keys: Int64s) -> Int64s:
        """Rows of the keys, of the same shape; 0 where unseen or missing."""
        rows = np.empty(keys.size, np.int64)
        self.into(rows, keys.reshape(-1))
        return rows.reshape(keys.shape)

    def into(self, rows: Int64s, keys: Int64s) -> tuple[int, int]:
        """The same of keys [B] into rows [B]; counts missing keys and rows 0."""
        counts: tuple[int, int] = _look_up(self._slots, (keys, rows))
        return counts


class Counter:
    """How often each of the keys came; the reserved ones may not."""

    def __init__(self) -> None:
        self._slots, self._free = _empty(10), 1 << 9

    def add(self, keys: Int64s) -> None:
        while True:
            done, self._free = _count((self._slots, self._free), keys)
            if done == len(keys):
                return
            keys = keys[done:]
            self._grow()

    def counts(self) -> tuple[Int64s, Int64s]:
        """The keys in any order, and their counts."""
        taken: npt.NDArray[np.bool_] = self._slots[:, 0] != _FREE
        return self._slots[taken, 0], self._slots[taken, 1]

    def _grow(self) -> None:
        keys, counts = self.counts()
        self._slots = _empty(len(self._slots).bit_length() + 1)
        self._free = len(self._slots) // 2 - len(keys)
        _put(self._slots, (keys, counts))
