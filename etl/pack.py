"""Raw rows -> packed requests, at the client and everywhere else: needs a signature, no fitted state and no torch."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from etl.faults import Fault
from etl.transform import (
    MISSING_KEY,
    MISSING_NUMBER,
    NO_KEY,
    RESERVED_KEYS,
    Encoded,
    Float64s,
    Int64s,
    Packed,
    Signature,
    Transform,
    check_numbers,
    not_reserved,
)

_FNV_OFFSET, _FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
ARROW = {"string": pa.large_string(), "int64": pa.int64(), "float64": pa.float64()}


def pack(table: pa.Table, signature: Signature) -> Packed:
    """Raw rows to a packed request.

    Raises:
        ValueError: an unknown or absent column, a value of the wrong type, infinity, NaN within a list, a list that
            is too long; names the column.
    """
    columns = {
        name: without_nan(array) if pa.types.is_floating(array.type) else array
        for name, array in _typed(table, signature).items()
    }
    for names, check in ((signature.keys, _check_keys), (signature.numbers, _check_numbers)):
        for name in names:
            check(_values(columns[name]), name=name)
    return _packed(columns, signature, rows=table.num_rows)


def pack_checked(table: pa.Table, signature: Signature) -> Packed:
    """The same of rows that were checked as they were typed (`etl/columns.py`)."""
    return _packed(_typed(table, signature), signature, rows=table.num_rows)


def _typed(table: pa.Table, signature: Signature) -> dict[str, pa.Array]:
    if faults := _column_faults(table.column_names, signature.columns):
        raise ValueError("; ".join(faults))
    return {name: typed_column(table[name], name=name, dtype=dtype) for name, dtype in signature.columns.items()}


def _packed(columns: Mapping[str, pa.Array], signature: Signature, *, rows: int) -> Packed:
    """Stored column by column: columns are what is read and written."""
    keys_CB = np.empty((len(signature.packed_names(signature.keys)), rows), np.int64)
    numbers_MB = np.empty((len(signature.packed_names(signature.numbers)), rows), np.float64)
    for names, into, of in ((signature.keys, keys_CB, _keys), (signature.numbers, numbers_MB, _numbers)):
        for name, place in signature.places(names).items():
            flat = of(_values(columns[name]))
            if name not in signature.slots:
                into[place] = flat
                continue
            slots, newest = signature.slots[name], name in signature.newest
            into[place] = _padded(flat, columns[name], name=name, slots=slots, newest=newest).T
    return Packed(keys_CB.T, numbers_MB.T)


def part(packed: Packed, signature: Signature, *, names: Collection[str]) -> Packed:
    """Packed rows of some of their raw columns."""
    places = [
        [at for at, name in enumerate(signature.packed_names(matrix)) if name in names]
        for matrix in (signature.keys, signature.numbers)
    ]
    return Packed(packed.keys[:, places[0]], packed.numbers[:, places[1]])


def encode(raw: pa.Table, transform: Transform, *, place: str, checked: bool = False) -> Encoded:
    """Packs and transforms raw rows; `checked` as for `pack_checked`.

    Raises:
        Fault: with `place`, where a value can't be packed, or where float32 can't hold what becomes of it.
    """
    try:
        packed = (pack_checked if checked else pack)(raw, transform.signature)
        transform.check_weights(packed)
    except ValueError as error:
        wanted = f"the columns {', '.join(f'{name} ({dtype})' for name, dtype in transform.signature.columns.items())}"
        raise Fault(place, got=str(error), wanted=wanted, remedy="mend the rows or the feature") from None
    with np.errstate(over="ignore"):  # it becomes infinity
        return finite(transform.apply(packed), transform, place=place)


def finite(encoded: Encoded, transform: Transform, *, place: str) -> Encoded:
    """The encoded rows. Raises Fault, with `place`, where float32 can't hold a number."""
    fits = np.isfinite(encoded.floats)
    if not fits.all():
        row, at = np.argwhere(~fits)[0]
        got = f"feature '{_float_names(transform)[at]}' leaves the range of float32 at row {row}"
        raise Fault(place, got=got, wanted="finite inputs", remedy="mend the row, or set 'clip' or 'log1p'")
    return encoded


def without_nan(array: pa.Array) -> pa.Array:
    """NaN is missing, as in the files that training reads."""
    if not pa.types.is_floating(array.type):
        return array
    nan = pc.is_nan(array)
    return pc.if_else(nan, pa.scalar(None, array.type), array) if pc.any(nan, min_count=0).as_py() else array


def _float_names(transform: Transform) -> list[str]:
    """The feature behind each column of `Encoded.floats`."""
    valued = [step for step in transform.features if step["kind"] == "field" or step.get("weights")]
    slots = [step["name"] for step in valued for _ in range(transform.signature.slots.get(step["column"], 1))]
    return [step["name"] for step in transform.dense] + slots


def _column_faults(names: Sequence[str], wanted: Mapping[str, str]) -> list[str]:
    unknown, absent = sorted(set(names) - set(wanted)), sorted(set(wanted) - set(names))
    faults = [f"unknown column '{name}'" for name in unknown] + [f"column '{name}' is missing" for name in absent]
    return faults + [f"column '{name}' comes twice" for name in {n for n in names if list(names).count(n) > 1}]


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
    return not_reserved(keys)


def inner_type(dtype: str) -> str:
    """The type of a list's values; another type is its own."""
    return dtype.removeprefix("list<").removesuffix(">")


def typed_column(column: pa.ChunkedArray, *, name: str, dtype: str) -> pa.Array:
    """Checks the kind of value before any cast: a float is no id and a text is no number."""
    chunks = column.chunks or [pa.array([], column.type)]
    array = chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)
    inner = inner_type(dtype)
    if inner == dtype:
        return _typed_values(array, name=name, dtype=dtype)
    if pa.types.is_null(array.type):
        return pa.nulls(len(array), pa.large_list(ARROW[inner]))
    if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
        raise ValueError(f"column '{name}' holds {array.type}, wanted {dtype}")
    values = _typed_values(array.flatten(), name=name, dtype=inner)  # a null list has no values
    lengths = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), pa.int64())
    return pa.LargeListArray.from_arrays(offsets, values)


def _typed_values(array: pa.Array, *, name: str, dtype: str) -> pa.Array:
    kind = array.type
    if kind == ARROW[dtype]:
        return array
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
    try:
        return array.cast(ARROW[dtype])
    except pa.ArrowInvalid as error:
        raise ValueError(f"column '{name}': {error}, wanted {dtype}") from None


def _values(array: pa.Array) -> pa.Array:
    """Those of a list, or the single ones."""
    return array.values if pa.types.is_large_list(array.type) else array


def _padded(flat: npt.NDArray[Any], array: pa.Array, *, name: str, slots: int, newest: bool) -> npt.NDArray[Any]:
    """Keys or numbers [R, slots] of lists, filled at the end, from the values of all lists."""
    offsets = np.asarray(array.offsets)
    lengths = np.diff(offsets)
    if not newest and lengths.max(initial=0) > slots:
        row = int(np.argmax(lengths > slots))
        raise ValueError(f"column '{name}' holds {lengths[row]} values at row {row}, at most {slots}: raise max_length")
    first = offsets[1:] - np.minimum(lengths, slots)
    at = first[:, None] + np.arange(slots)
    filled = at < offsets[1:, None]
    nothing = NO_KEY if flat.dtype == np.int64 else MISSING_NUMBER
    return np.where(filled, np.append(flat, nothing)[np.where(filled, at, -1)], nothing)


def _check_keys(array: pa.Array, *, name: str) -> None:
    if array.type == pa.large_string() or array.null_count == len(array):
        return
    if (lowest := pc.min(array).as_py()) in RESERVED_KEYS:
        raise ValueError(f"column '{name}' holds {lowest}, which stands for missing: send null")


def _check_numbers(array: pa.Array, *, name: str) -> None:
    check_numbers(_numbers(array)[:, None], [name])


def _keys(array: pa.Array) -> Int64s:
    if array.type == pa.large_string():
        return text_keys(array)
    keys: Int64s = (array.fill_null(MISSING_KEY) if array.null_count else array).to_numpy(zero_copy_only=False)
    return keys


def _numbers(array: pa.Array) -> Float64s:
    """Also of a column of whole numbers."""
    array = array.cast(pa.float64(), safe=False) if pa.types.is_integer(array.type) else array
    numbers: Float64s = (array.fill_null(MISSING_NUMBER) if array.null_count else array).to_numpy(zero_copy_only=False)
    return numbers
