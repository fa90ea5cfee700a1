"""Keys, and the hash tables that give each its number.

Copied into a bundle beside `etl/transform.py`, so it imports nothing of ours. A bundle holds each table as a file that
all instances of the server map: one copy in the page cache, whatever its size, and nothing to build at the start.
"""

from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

Int64s = npt.NDArray[np.int64]
Float64s = npt.NDArray[np.float64]

MISSING_KEY = np.iinfo(np.int64).min
NO_KEY = MISSING_KEY + 1
RESERVED_KEYS = (MISSING_KEY, NO_KEY)


def mix(keys: Int64s) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014): spreads keys over all 64 bits, one to one."""
    z = keys.view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed


class Vocabulary:
    """Keys int64 [V], each once, and the table row of each, in a hash table with linear probing.

    Whole columns are looked up at once: a vectorised step compares every key with its slot, the few that met another
    key go one slot further. At most half of the slots are taken.
    """

    def __init__(self, keys: Int64s, rows: Int64s) -> None:
        self._use(slots_of(keys, rows))

    def _use(self, slots_2S: Int64s, *, otherwise: int = 0) -> None:
        self._keys: Int64s = slots_2S[0]
        self._rows: Int64s = slots_2S[1]
        self._otherwise, self._last = otherwise, slots_2S.shape[1] - 1
        self._shift = _shift(slots_2S.shape[1])

    @classmethod
    def over(cls, slots_2S: Int64s, *, otherwise: int = 0) -> Self:
        """Over slots that are filled; `otherwise` is the row of a key that has none."""
        made = cls.__new__(cls)
        made._use(slots_2S, otherwise=otherwise)
        return made

    @classmethod
    def read(cls, path: Path) -> Self:
        """From the vocabulary parquet: columns value, key, row, count."""
        return cls(*_columns(path, "row"))

    @classmethod
    def mapped(cls, path: Path) -> Self:
        """The same from the table that `write_slots` left beside it; raises ValueError where that is not whole."""
        return cls.over(_mapped(path))

    def __call__(self, keys: Int64s) -> Int64s:
        """Rows of the keys, of the same shape; 0 where unseen or missing."""
        flat = keys.reshape(-1)
        slots = _home(flat, self._shift)
        found, rows = self._keys.take(slots), self._rows.take(slots)
        at = np.flatnonzero(found != flat)
        rows[at] = self._otherwise
        sought, slots, found = flat.take(at), slots.take(at), found.take(at)
        while (others := np.flatnonzero(found != NO_KEY)).size:
            at, sought, slots = at.take(others), sought.take(others), (slots.take(others) + 1) & self._last
            found = self._keys.take(slots)
            hits = np.flatnonzero(found == sought)
            rows[at.take(hits)] = self._rows.take(slots.take(hits))
            found[hits] = NO_KEY
        return rows.reshape(keys.shape)


class Encoding:
    """Numbers of keys, as bits in the place of rows; `other` is that of a missing or unseen key."""

    def __init__(self, slots_2S: Int64s, other: float) -> None:
        self._other = other
        self._bits = Vocabulary.over(slots_2S, otherwise=np.array([other]).view(np.int64).item())

    @classmethod
    def read(cls, path: Path, other: float) -> Self:
        """From a parquet with the columns key and value."""
        return cls(slots_of(*_columns(path, "value")), other)

    @classmethod
    def mapped(cls, path: Path, other: float) -> Self:
        """The same from the table that `write_slots` left beside it; raises ValueError where that is not whole."""
        return cls(_mapped(path), other)

    def __call__(self, keys: Int64s) -> Float64s:
        """float64, of the shape of the keys."""
        numbers: Float64s = self._bits(keys).view(np.float64)
        numbers[keys == NO_KEY] = self._other  # it marks free slots, which have no number
        return numbers


def slots_of(keys: Int64s, rows: Int64s) -> Int64s:
    """A hash table [2, S]: the key in each slot, NO_KEY in free ones, and its row."""
    bits = max(1, (2 * len(keys) - 1).bit_length()) if len(keys) else 1
    slots_2S = np.zeros((2, 1 << bits), np.int64)
    key_S, row_S = slots_2S
    key_S[:] = NO_KEY
    slots, left = _home(keys, _shift(len(key_S))), np.arange(len(keys))
    while left.size:
        free = key_S[slots[left]] == NO_KEY
        tried, others = left[free], left[~free]
        key_S[slots[tried]] = keys[tried]
        placed = key_S[slots[tried]] == keys[tried]
        row_S[slots[tried[placed]]] = rows[tried[placed]]
        left = np.concatenate([others, tried[~placed]])
        slots[left] = (slots[left] + 1) & (len(key_S) - 1)
    return slots_2S


def write_slots(transform: Path) -> None:
    """Beside each vocabulary and encoding in a `transform/` folder, its hash table as a .npy file to be mapped."""
    for path in transform.glob("vocabulary/*.parquet"):
        np.save(path.with_suffix(".npy"), slots_of(*_columns(path, "row")))
    for path in transform.glob("encoding/*.parquet"):
        np.save(path.with_suffix(".npy"), slots_of(*_columns(path, "value")))


def _mapped(parquet: Path) -> Int64s:
    """The hash table [2, S] beside this file: all processes that look into it share its pages."""
    path = parquet.with_suffix(".npy")
    remedy = "copy the bundle anew, or export it again"
    try:
        slots = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: {error}, wanted a hash table: {remedy}") from None
    size, wanted = path.stat().st_size, slots.offset + slots.nbytes
    if slots.dtype != np.int64 or slots.ndim != 2 or len(slots) != 2 or slots.shape[1].bit_count() != 1:
        raise ValueError(f"{path}: {slots.dtype} {slots.shape}, wanted int64 [2, a power of two]: {remedy}")
    if size != wanted:
        raise ValueError(f"{path}: {size} bytes, wanted {wanted}: {remedy}")
    return np.asarray(slots)


def _columns(path: Path, number: str) -> tuple[Int64s, Int64s]:
    """The keys, and beside each its row, or the bits of its value as float64."""
    file = pq.ParquetFile(path)  # `read_table` would import pyarrow's datasets, which takes as long as a vocabulary
    if not file.num_row_groups:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    table = file.read(columns=["key", number])
    numbers = table[number].to_numpy()
    return table["key"].to_numpy(), numbers if number == "row" else numbers.astype(np.float64).view(np.int64)


def _shift(slots: int) -> np.uint64:
    return np.uint64(65 - slots.bit_length())


def _home(keys: Int64s, shift: np.uint64) -> Int64s:
    """The slot where each key's search begins."""
    return (mix(keys) >> shift).astype(np.int64)
