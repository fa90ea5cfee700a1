"""Compiled tables of keys beside a dictionary."""

import itertools
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from etl.engines import compiled
from etl.lookup import MISSING_KEY, RESERVED_KEYS, Vocabulary

KEYS = st.integers(-(2**63), 2**63 - 1).filter(lambda key: key not in RESERVED_KEYS)
NEAR = st.integers(0, 40)


@given(st.lists(st.one_of(KEYS, NEAR), unique=True), st.lists(st.one_of(KEYS, NEAR, st.just(MISSING_KEY))))
def test_rows_of_keys(known: list[int], sought: list[int]) -> None:
    keys, rows = np.array(known, np.int64), np.arange(1, len(known) + 1)
    row = dict(zip(known, rows.tolist(), strict=True))
    asked = np.array([*sought, *known], np.int64)
    found = compiled.CompiledVocabulary(keys, rows)(asked)
    assert found.tolist() == [row.get(key, 0) for key in asked.tolist()]
    assert found.tolist() == Vocabulary(keys, rows)(asked).tolist()


def test_rows_of_a_matrix_of_keys_that_can_not_be_written() -> None:
    vocabulary = compiled.CompiledVocabulary(np.array([7, -9]), np.array([1, 2]))
    keys = np.array([[7, -9, 8], [-9, 7, MISSING_KEY]]).T
    keys.flags.writeable = False
    assert vocabulary(keys).tolist() == [[1, 2], [2, 1], [0, 0]]


@given(st.lists(st.lists(st.one_of(KEYS, NEAR, st.just(MISSING_KEY)))))
def test_counts_of_batches(batches: list[list[int]]) -> None:
    counter = compiled.Counter()
    for batch in batches:
        counter.add(np.array(batch, np.int64))
    keys, counts = counter.counts()
    assert dict(zip(keys.tolist(), counts.tolist(), strict=True)) == Counter(itertools.chain(*batches))


def test_counts_of_many_keys_in_a_table_that_grows() -> None:
    keys = np.random.default_rng(0).zipf(1.2, 300_000) * np.int64(-0x61C8864680B583EB)
    counter = compiled.Counter()
    for part in np.array_split(keys, 7):
        counter.add(part)
    got = dict(zip(*(array.tolist() for array in counter.counts()), strict=True))
    assert got == Counter(keys.tolist()) and len(got) > 10_000
