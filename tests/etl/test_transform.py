"""The transform: packing, keys, lookups, crosses and scaling against slow, obvious references."""

import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etl.lookup import Vocabulary
from etl.pack import pack, text_keys
from etl.transform import (
    MISSING_KEY,
    MISSING_NUMBER,
    NO_KEY,
    Packed,
    Signature,
    Transform,
    bucket_keys,
    hashed_rows,
    mix,
    scale,
)


def fnv1a_64(text: str) -> int:
    """The textbook loop, one byte at a time."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) % 2**64
    return value - 2**64 if value >= 2**63 else value


def test_published_fnv_values() -> None:
    # Fowler, Noll, Vo: 64-bit FNV-1a of "", "a" and "foobar".
    published = [0xCBF29CE484222325, 0xAF63DC4C8601EC8C, 0x85944171F73967E8]
    assert [int(key) % 2**64 for key in text_keys(pa.array(["", "a", "foobar"]))] == published


@given(st.lists(st.one_of(st.none(), st.text(max_size=30)), max_size=20), st.integers(0, 3))
def test_keys_equal_the_textbook_hash(texts: list[str | None], skip: int) -> None:
    array = pa.array(texts, pa.string()).slice(min(skip, len(texts)))
    wanted = [MISSING_KEY if text is None else fnv1a_64(text) for text in array.to_pylist()]
    assert text_keys(array).tolist() == wanted


def test_mix_is_splitmix64() -> None:
    # First outputs of splitmix64 from state 0 (Vigna's reference implementation): mix(0) and mix(golden gamma).
    gamma = np.array([0x9E3779B97F4A7C15], np.uint64).view(np.int64)
    assert [int(mix(np.array([0]))[0]), int(mix(gamma)[0])] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=50), st.integers(2, 1000))
def test_hashed_rows_stay_in_the_table(keys: list[int], rows: int) -> None:
    found = hashed_rows(np.array(keys, np.int64), rows=rows)
    assert all((row == 0) == (key == MISSING_KEY) and 0 <= row < rows for row, key in zip(found, keys, strict=True))


@given(
    st.sets(st.integers(-(2**63) + 1, 2**63 - 1), max_size=30), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=30)
)
def test_vocabulary_finds_what_it_holds_and_nothing_else(known: set[int], asked: list[int]) -> None:
    keys = np.array(sorted(known), np.int64)
    rows = np.arange(1, len(keys) + 1, dtype=np.int64)
    reference = dict(zip(keys.tolist(), rows.tolist(), strict=True))
    queries = [*asked, *known]
    assert Vocabulary(keys, rows)(np.array(queries, np.int64)).tolist() == [reference.get(key, 0) for key in queries]


def test_ids_near_two_to_the_63_do_not_pass_through_floats() -> None:
    ids = [2**63 - 1, 2**63 - 2, 2**53 + 1, 2**53, None]
    signature = Signature({"user": "int64"}, ("user",), (), {}, ())
    assert pack(pa.table({"user": pa.array(ids)}), signature).keys[:, 0].tolist() == [*ids[:-1], MISSING_KEY]


def test_a_column_of_nulls_alone_packs_as_missing() -> None:
    signature = Signature({"a": "string", "n": "float64"}, ("a",), ("n",), {}, ())
    packed = pack(pa.table({"a": pa.nulls(2), "n": pa.nulls(2)}), signature)
    assert packed.keys.tolist() == [[MISSING_KEY]] * 2 and packed.numbers.tolist() == [[MISSING_NUMBER]] * 2


def test_nan_is_missing_as_in_training() -> None:
    signature = Signature({"n": "float64"}, (), ("n",), {}, ())
    packed = pack(pa.table({"n": [1.0, float("nan")]}), signature)
    assert packed.numbers.tolist() == [[1.0], [MISSING_NUMBER]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": ["x"], "n": [1.0], "z": [1]}, "unknown column 'z'"),
        ({"a": ["x"]}, "column 'n' is missing"),
        ({"a": [7], "n": [1.0]}, "column 'a' holds int64, wanted string"),
        ({"a": ["x"], "n": ["1"]}, "column 'n' holds string, wanted float64"),
        ({"a": ["x"], "n": [float("inf")]}, "column 'n' holds inf"),
    ],
)
def test_bad_rows_name_their_column(columns: dict[str, list[object]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(pa.table(columns), Signature({"a": "string", "n": "float64"}, ("a",), ("n",), {}, ()))


def test_float_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="column 'user' holds double, wanted int64"):
        pack(pa.table({"user": [1.0]}), Signature({"user": "int64"}, ("user",), (), {}, ()))


def test_buckets_and_scaling() -> None:
    numbers = np.array([-1.0, 0.0, 9.9, 10.0, MISSING_NUMBER])
    assert bucket_keys(numbers, [0.0, 10.0]).tolist() == [0, 1, 1, 2, MISSING_KEY]
    step = {"fill": 3.0, "clip": [0.0, 5.0], "log1p": True, "mean": 1.0, "std": 2.0}
    wanted = (np.log1p([0.0, 0.0, 5.0, 5.0, 3.0]) - 1.0) / 2.0
    np.testing.assert_allclose(scale(numbers, step), wanted, rtol=1e-15)


def test_signature_survives_json_and_a_cross_needs_all_its_parts() -> None:
    state = {
        "signature": {
            "columns": {"a": "string", "n": "float64"},
            "keys": ["a"],
            "numbers": ["n"],
            "slots": {},
            "newest": [],
        },
        "features": [
            {"name": "a", "kind": "hash", "column": "a", "rows": 50},
            {"name": "b", "kind": "buckets", "column": "n", "boundaries": [0.0]},
            {"name": "ab", "kind": "cross", "inputs": ["a", "b"], "rows": 1000},
        ],
        "dense": [],
    }
    transform = Transform(state, {})
    signature = Signature.from_json(json.loads(json.dumps(transform.signature.as_json())))
    rows = pa.table({"a": ["x", "x", None, "x"], "n": pa.array([1.0, -1.0, 1.0, None])})
    encoded = transform.apply(pack(rows, signature))
    assert encoded.ids[:, 1].tolist() == [2, 1, 2, 0]
    assert encoded.ids[2:, 2].tolist() == [0, 0] and encoded.ids[0, 2] != encoded.ids[1, 2] > 0
    assert encoded.missing.tolist() == [1, 1, 2] and encoded.unseen.tolist() == [0, 0, 0]


@pytest.mark.parametrize("rows", [0, 1, 40_000])
def test_columns_that_are_taken_together_come_out_as_each_alone(rows: int) -> None:
    """40,000 rows are more than one block of hashed columns."""
    generator = np.random.default_rng(rows)
    scaling = [
        {"fill": 3.0, "clip": [0.0, 5.0], "log1p": True, "mean": 1.0, "std": 2.0},
        {"fill": -1.0, "clip": None, "log1p": False, "mean": 0.5, "std": 3.0},
    ]
    state = {
        "signature": {
            "columns": {"a": "int64", "b": "int64", "c": "list<int64>", "m": "float64", "n": "float64"},
            "keys": ["a", "b", "c"],
            "numbers": ["m", "n"],
            "slots": {"c": 2},
            "newest": [],
        },
        "features": [
            {"name": name, "kind": "hash", "column": name, "rows": size}
            for name, size in (("a", 11), ("b", 1000), ("c", 2))
        ],
        "dense": [{"name": name, "column": name, **step} for name, step in zip("mn", scaling, strict=True)],
    }
    keys = generator.choice([MISSING_KEY, 0, 1, 2**62, -5], (rows, 4))
    keys[: rows // 2, 3] = NO_KEY
    numbers = generator.choice([MISSING_NUMBER, -2.0, 0.5, 9.0], (rows, 2))
    encoded = Transform(state, {}).apply(Packed(keys, numbers))
    wanted = np.stack([hashed_rows(keys[:, at], rows=size) for at, size in enumerate((11, 1000, 2, 2))], axis=1)
    wanted[keys == NO_KEY] = -1
    assert np.array_equal(encoded.ids, wanted)
    floats = [scale(numbers[:, at], step) for at, step in enumerate(scaling)]
    assert np.array_equal(encoded.floats, np.stack(floats, axis=1).astype(np.float32))
    absent = keys == MISSING_KEY
    assert encoded.missing.tolist() == [absent[:, 0].sum(), absent[:, 1].sum(), absent[:, 2:].sum()]
    assert encoded.unseen.tolist() == [0, 0, 0]
