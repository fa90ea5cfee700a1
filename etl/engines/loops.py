"""The ETL's inner loops: C functions that numba compiles, called through `native.py`.

A table of keys is int64 [slots, 2], the key and what belongs to it side by side: a search meets one line of the cache.
Probing is linear, NO_KEY marks a free slot, and at most half of the slots are taken. Where a table is larger than the
cache, the lines of the keys ahead are asked for, which takes a third off a lookup's time.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import llvmlite.ir as ir
import numba
import numpy as np
from numba import carray
from numba.core import cgutils
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

from etl.lookup import MISSING_KEY, NO_KEY, Float64s, Int64s
from etl.transform import MISSING_NUMBER, Float32s

Inlined = TypeVar("Inlined", bound=Callable[..., Any])

_FREE, _AHEAD = NO_KEY, 16
_CACHED = 1 << 16  # slots that the processor's cache holds without being asked
_inline: Callable[[Inlined], Inlined] = numba.njit(inline="always")  # a call counts references: four times as slow
_INT, _NUMBER = numba.int64, numba.float64


def loop(*kinds: numba.types.Type) -> Callable[[Callable[..., None]], CFunc]:
    """A C function of pointers to these types. What divides by zero is infinite, as numpy has it."""
    made: Callable[[Callable[..., None]], CFunc] = numba.cfunc(
        numba.void(*(numba.types.CPointer(kind) for kind in kinds)), error_model="numpy"
    )
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


@loop(_INT, _INT, _INT, _INT)
def put(slots_at: Int64s, keys_at: Int64s, values_at: Int64s, sizes_at: Int64s) -> None:
    """Puts keys, each with its value, into slots; sizes are those of slots and keys."""
    sizes = carray(sizes_at, (2,))
    slots, keys, values = carray(slots_at, (sizes[0], 2)), carray(keys_at, sizes[1]), carray(values_at, sizes[1])
    for i in range(len(keys)):
        if i + _AHEAD < len(keys):
            _ask(slots, keys[i + _AHEAD])
        at = _slot(slots, keys[i])
        slots[at, 0], slots[at, 1] = keys[i], values[i]


@loop(_INT, _INT, _INT, _INT)
def look_up(slots_at: Int64s, keys_at: Int64s, rows_at: Int64s, sizes_at: Int64s) -> None:
    """Writes the row of each key, 0 of an unseen one; sizes are those of slots and keys.

    After them it writes the number of missing keys and of rows 0.
    """
    sizes = carray(sizes_at, (4,))
    slots, keys, rows = carray(slots_at, (sizes[0], 2)), carray(keys_at, sizes[1]), carray(rows_at, sizes[1])
    missing = zeros = 0
    for i in range(len(keys)):
        if i + _AHEAD < len(keys):
            _ask(slots, keys[i + _AHEAD])
        at = _slot(slots, keys[i])
        row = slots[at, 1] if slots[at, 0] == keys[i] else 0
        rows[i] = row
        missing += keys[i] == MISSING_KEY
        zeros += row == 0
    sizes[2], sizes[3] = missing, zeros


@loop(_INT, _INT, _INT)
def count(slots_at: Int64s, keys_at: Int64s, sizes_at: Int64s) -> None:
    """Counts keys while new ones may take a slot; sizes are those of slots and keys, and the slots that may be taken.

    After them it writes how many keys it counted; the slots are those that are left.
    """
    sizes = carray(sizes_at, (4,))
    slots, keys = carray(slots_at, (sizes[0], 2)), carray(keys_at, sizes[1])
    free, done = sizes[2], len(keys)
    for i in range(len(keys)):
        if i + _AHEAD < len(keys):
            _ask(slots, keys[i + _AHEAD])
        at = _slot(slots, keys[i])
        if slots[at, 0] == _FREE:
            if not free:
                done = i
                break
            slots[at, 0] = keys[i]
            free -= 1
        slots[at, 1] += 1
    sizes[2], sizes[3] = free, done


@loop(_NUMBER, _NUMBER, _NUMBER, _NUMBER, _INT)
def fill(numbers_at: Float64s, filled_at: Float64s, above_at: Float64s, settings_at: Float64s, size_at: Int64s) -> None:
    """Fills what is missing, clips, and adds 1; settings are the filling, both ends, and the lowest number kept."""
    size = carray(size_at, (1,))[0]
    numbers, filled, above = carray(numbers_at, size), carray(filled_at, size), carray(above_at, size)
    filling, low, high, floor = carray(settings_at, (4,))
    for i in range(size):
        x = numbers[i] if numbers[i] > MISSING_NUMBER else filling  # NaN isn't above it either
        x = x if x > low else low
        x = x if x < high else high
        x = x if x > floor else floor
        filled[i], above[i] = x, x + 1.0


@_inline
def _log1p(x: np.float64, log: np.float64) -> np.float64:
    """log(1 + x) from the logarithm of what 1 + x came to, with what that lost given back."""
    above = x + 1.0
    return (x - (above - 1.0)) / above + log


@_inline
def _scale(scaled_at: Float64s | Float32s, given: tuple[Float64s, Float64s, Float64s, Int64s]) -> None:
    filled_at, logs_at, settings_at, size_at = given
    size = carray(size_at, (1,))[0]
    filled, logs, scaled = carray(filled_at, size), carray(logs_at, size), carray(scaled_at, size)
    mean, std, log = carray(settings_at, (3,))
    for i in range(size):
        x = _log1p(filled[i], logs[i]) if log else filled[i]
        scaled[i] = (x - mean) / std


@loop(_NUMBER, _NUMBER, _NUMBER, _NUMBER, _INT)
def scale64(
    filled_at: Float64s, logs_at: Float64s, settings_at: Float64s, scaled_at: Float64s, size_at: Int64s
) -> None:
    """Scales numbers, or log(1 + x) of them where the third setting is not 0; the others are mean and deviation."""
    _scale(scaled_at, (filled_at, logs_at, settings_at, size_at))


@loop(_NUMBER, _NUMBER, _NUMBER, numba.float32, _INT)
def scale32(
    filled_at: Float64s, logs_at: Float64s, settings_at: Float64s, scaled_at: Float32s, size_at: Int64s
) -> None:
    """The same, rounded to float32."""
    _scale(scaled_at, (filled_at, logs_at, settings_at, size_at))


LOOPS: tuple[CFunc, ...] = (put, look_up, count, fill, scale64, scale32)
