"""The fitted transform: raw rows -> packed request -> ids and dense values.

The same file runs in the ETL, in offline scoring and, copied into a bundle, inside the model server, so it imports
nothing of ours. It has two halves. `Packer` needs no fitted state and runs at the client: texts become 64-bit keys
(FNV-1a over UTF-8), whole numbers are their own keys, and the lowest value of a type stands for missing. `Transform`
holds the fitted state and turns packed rows into table rows (row 0 = missing or unseen) and dense values.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

Int64s = npt.NDArray[np.int64]
Float64s = npt.NDArray[np.float64]
Float32s = npt.NDArray[np.float32]

State = Mapping[str, Any]
"""A part of transform.json, or of the signature, as JSON values."""

MISSING_KEY = np.iinfo(np.int64).min
MISSING_NUMBER = float(np.finfo(np.float64).min)
_FNV_OFFSET, _FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)


@dataclass(frozen=True)
class Packed:
    """Raw rows as they travel: keys int64 [B, C], numbers float64 [B, M]."""

    keys: Int64s
    numbers: Float64s


@dataclass(frozen=True)
class Encoded:
    """What the network reads: ids int64 [B, F], dense float32 [B, N]; missing int64 [F] counts the absent values."""

    ids: Int64s
    dense: Float32s
    missing: Int64s

    @property
    def unseen(self) -> Int64s:
        """Values by feature [F] that were there but have no row of their own."""
        unseen: Int64s = (self.ids == 0).sum(axis=0) - self.missing
        return unseen


def text_keys(values: pa.Array) -> Int64s:
    """FNV-1a 64 of each text's UTF-8 bytes as a signed number; a null is MISSING_KEY."""
    encoded = values.cast(pa.large_string()).dictionary_encode()
    keys = np.append(_fnv1a(encoded.dictionary), MISSING_KEY)
    index: Int64s = encoded.indices.fill_null(len(keys) - 1).to_numpy(zero_copy_only=False)
    taken: Int64s = keys[index]
    return taken


def _fnv1a(texts: pa.Array) -> Int64s:
    """One byte position at a time, over all texts that are long enough to have it."""
    size, start = len(texts), texts.offset
    offsets = np.frombuffer(texts.buffers()[1], np.int64)[start : start + size + 1] if size else np.zeros(1, np.int64)
    data = np.frombuffer(texts.buffers()[2] or b"", np.uint8)
    lengths = np.diff(offsets)
    order = np.argsort(-lengths, kind="stable")
    hashes = np.full(size, _FNV_OFFSET, np.uint64)
    for position in range(int(lengths.max(initial=0))):
        longer = order[: int(np.count_nonzero(lengths > position))]
        byte = data[offsets[:-1][longer] + position].astype(np.uint64)
        hashes[longer] = (hashes[longer] ^ byte) * _FNV_PRIME
    keys = hashes.view(np.int64)
    return np.where(keys == MISSING_KEY, MISSING_KEY + 1, keys)


def mix(keys: Int64s) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014): spreads keys over all 64 bits, one to one."""
    z = keys.view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed


def hashed_rows(keys: Int64s, *, rows: int) -> Int64s:
    """Rows 1 to rows - 1 by hash; a missing key is row 0."""
    hashed = (mix(keys) % np.uint64(rows - 1)).astype(np.int64) + 1
    return np.where(keys == MISSING_KEY, 0, hashed)


@dataclass(frozen=True)
class Packer:
    """The stateless half. `columns` maps each raw column to "string", "int64" or "float64"."""

    columns: Mapping[str, str]
    keys: tuple[str, ...]
    numbers: tuple[str, ...]

    @classmethod
    def from_signature(cls, signature: State) -> "Packer":
        """From `signature()`, after a trip through JSON."""
        return cls(dict(signature["columns"]), tuple(signature["keys"]), tuple(signature["numbers"]))

    def signature(self) -> State:
        """What a client has to know, as JSON values."""
        return {"columns": dict(self.columns), "keys": list(self.keys), "numbers": list(self.numbers)}

    def pack(self, table: pa.Table) -> Packed:
        """Raw rows to a packed request.

        Raises:
            ValueError: an unknown or absent column, a value of the wrong type, NaN or infinity; names the column.
        """
        if faults := self._column_faults(table.column_names):
            raise ValueError("; ".join(faults))
        typed = {name: typed_column(table[name], name=name, dtype=dtype) for name, dtype in self.columns.items()}
        size = table.num_rows
        keys = [_keys(typed[name], name=name) for name in self.keys]
        numbers = [_numbers(typed[name], name=name) for name in self.numbers]
        return Packed(
            np.stack(keys, axis=1) if keys else np.empty((size, 0), np.int64),
            np.stack(numbers, axis=1) if numbers else np.empty((size, 0), np.float64),
        )

    def _column_faults(self, names: Sequence[str]) -> list[str]:
        unknown, absent = sorted(set(names) - set(self.columns)), sorted(set(self.columns) - set(names))
        faults = [f"unknown column '{name}'" for name in unknown] + [f"column '{name}' is missing" for name in absent]
        return faults + [f"column '{name}' comes twice" for name in {n for n in names if list(names).count(n) > 1}]


def typed_column(column: pa.ChunkedArray, *, name: str, dtype: str) -> pa.Array:
    """Checks the kind of value before any cast: a float is no id and a text is no number."""
    kind, array = column.type, column.combine_chunks()
    if pa.types.is_dictionary(kind):
        array, kind = array.cast(kind.value_type), kind.value_type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    allowed = (
        pa.types.is_null(kind)
        or {
            "string": text,
            "int64": pa.types.is_integer(kind),
            "float64": pa.types.is_integer(kind) or pa.types.is_floating(kind),
        }[dtype]
    )
    if not allowed:
        raise ValueError(f"column '{name}' holds {kind}, wanted {dtype}")
    wanted = {"string": pa.large_string(), "int64": pa.int64(), "float64": pa.float64()}[dtype]
    try:
        return array.cast(wanted)
    except pa.ArrowInvalid as error:
        raise ValueError(f"column '{name}': {error}, wanted {dtype}") from None


def _keys(array: pa.Array, *, name: str) -> Int64s:
    if array.type == pa.large_string():
        return text_keys(array)
    if array.null_count < len(array) and pc.min(array).as_py() == MISSING_KEY:
        raise ValueError(f"column '{name}' holds {MISSING_KEY}, which stands for missing: send null")
    keys: Int64s = array.fill_null(MISSING_KEY).to_numpy(zero_copy_only=False)
    return keys


def _numbers(array: pa.Array, *, name: str) -> Float64s:
    numbers: Float64s = array.cast(pa.float64(), safe=False).fill_null(MISSING_NUMBER).to_numpy(zero_copy_only=False)
    check_numbers(numbers[:, None], [name])
    return numbers


def check_numbers(numbers: Float64s, names: Sequence[str]) -> None:
    """Raises ValueError naming the first column of [B, M] that holds NaN or infinity."""
    finite = np.isfinite(numbers)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise ValueError(f"column '{names[column]}' holds {numbers[row, column]} at row {row}: send null for missing")


@dataclass(frozen=True)
class Vocabulary:
    """Sorted keys int64 [V] and the table row of each, both of the same length."""

    keys: Int64s
    rows: Int64s

    @classmethod
    def read(cls, path: Path) -> "Vocabulary":
        """From the vocabulary parquet: columns value, key, row, count."""
        table = pq.read_table(path, columns=["key", "row"])
        keys, rows = (table[name].to_numpy() for name in ("key", "row"))
        order = np.argsort(keys)
        return cls(keys[order], rows[order])

    def __call__(self, keys: Int64s) -> Int64s:
        """Rows of the keys; 0 where unseen or missing."""
        if not len(self.keys):
            return np.zeros(len(keys), np.int64)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[at] == keys, self.rows[at], 0)


class Transform:
    """The fitted state of a dataset folder's `transform/`."""

    def __init__(self, state: State, vocabularies: Mapping[str, Vocabulary]) -> None:
        self.packer = Packer.from_signature(state["signature"])
        self.columns = dict(self.packer.columns)
        self.features: list[State] = state["features"]
        self.dense: list[State] = state["dense"]
        self._vocabularies = vocabularies

    @classmethod
    def load(cls, folder: Path) -> "Transform":
        """Reads `transform.json` and the vocabularies it names."""
        state = json.loads((folder / "transform.json").read_text(encoding="utf-8"))
        tables = [step["name"] for step in state["features"] if step["kind"] == "vocabulary"]
        return cls(state, {t: Vocabulary.read(folder / "vocabulary" / f"{t}.parquet") for t in tables})

    def signature(self) -> State:
        """What a client has to know to pack a request, as JSON values."""
        return self.packer.signature()

    def pack(self, table: pa.Table) -> Packed:
        """See `Packer.pack`."""
        return self.packer.pack(table)

    def apply(self, packed: Packed) -> Encoded:
        """Packed rows [B, ...] to ids [B, F] and dense values [B, N]; never fails on checked numbers."""
        size = len(packed.keys)
        ids = np.zeros((size, len(self.features)), np.int64)
        keys: dict[str, Int64s] = {}
        for at, step in enumerate(self.features):
            keys[step["name"]] = key = self._key(step, packed=packed, keys=keys)
            ids[:, at] = self._rows(step, key)
        dense = np.zeros((size, len(self.dense)), np.float32)
        for at, step in enumerate(self.dense):
            dense[:, at] = scale(packed.numbers[:, self.packer.numbers.index(step["column"])], step)
        missing = np.array([np.count_nonzero(key == MISSING_KEY) for key in keys.values()], np.int64)
        return Encoded(ids, dense, missing)

    def _key(self, step: State, *, packed: Packed, keys: Mapping[str, Int64s]) -> Int64s:
        """The value of an id feature before its table is looked up."""
        if step["kind"] == "cross":
            return _crossed([keys[name] for name in step["inputs"]])
        if step["kind"] == "buckets":
            return bucket_keys(packed.numbers[:, self.packer.numbers.index(step["column"])], step["boundaries"])
        return packed.keys[:, self.packer.keys.index(step["column"])]

    def _rows(self, step: State, key: Int64s) -> Int64s:
        if step["kind"] == "vocabulary":
            return self._vocabularies[step["name"]](key)
        if step["kind"] == "buckets":
            return np.where(key == MISSING_KEY, 0, key + 1)
        return hashed_rows(key, rows=step["rows"])


def bucket_keys(numbers: Float64s, boundaries: Sequence[float]) -> Int64s:
    """Bucket 0 lies below the first edge, an edge opens the bucket at its right; missing stays missing."""
    buckets = np.searchsorted(np.asarray(boundaries, np.float64), numbers, side="right").astype(np.int64)
    return np.where(numbers == MISSING_NUMBER, MISSING_KEY, buckets)


def _crossed(parts: Sequence[Int64s]) -> Int64s:
    """One key of several, in their order; missing where a part is."""
    crossed = np.zeros(len(parts[0]), np.int64)
    for part in parts:
        crossed = mix(crossed ^ mix(part).view(np.int64)).view(np.int64)
    missing = np.any([part == MISSING_KEY for part in parts], axis=0)
    return np.where(missing, MISSING_KEY, np.where(crossed == MISSING_KEY, MISSING_KEY + 1, crossed))


def scale(numbers: Float64s, step: State) -> Float64s:
    """Fill, clip, log1p, standardize, in this order and in float64."""
    x = np.where(numbers == MISSING_NUMBER, step["fill"], numbers)
    x = np.clip(x, *step["clip"]) if step["clip"] else x
    x = np.log1p(np.maximum(x, 0.0)) if step["log1p"] else x
    scaled: Float64s = (x - step["mean"]) / step["std"]
    return scaled
