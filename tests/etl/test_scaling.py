"""Numbers scaled by compiled loops beside the served transform's way."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from etl.engines import scaling
from etl.engines.compiled import CompiledVocabulary
from etl.lookup import MISSING_KEY, NO_KEY, Vocabulary
from etl.transform import MISSING_NUMBER, Packed, Transform, as_columns, scale

NUMBERS = st.one_of(
    st.floats(allow_infinity=False),  # NaN is missing
    st.floats(-10, 10),
    st.sampled_from([MISSING_NUMBER, 0.0, -0.0, -1.0, 1e-320, 1.7e308]),
)
FINITE = st.floats(-1e6, 1e6)
STEPS = st.fixed_dictionaries(
    {
        "fill": FINITE,
        "clip": st.none() | st.tuples(FINITE, FINITE).map(sorted).map(tuple),
        "log1p": st.booleans(),
        "mean": FINITE,
        "std": st.floats(1e-3, 1e6),
    }
)


@given(st.lists(STEPS, min_size=1, max_size=4), st.lists(NUMBERS), st.sampled_from([np.float32, np.float64]))
def test_the_same_to_the_last_bit(steps: list[dict], row: list[float], kind: type) -> None:
    numbers = np.stack([np.roll(np.array(row), at) for at in range(len(steps))])
    numbers.flags.writeable = False
    found = np.full(numbers.shape, np.nan, kind)
    scaling.scale(numbers, as_columns(steps), into=found)
    with np.errstate(over="ignore"):
        wanted = np.stack([scale(own, step) for own, step in zip(numbers, steps, strict=True)]).astype(kind)
    np.testing.assert_array_equal(found, wanted)


@given(st.lists(st.sampled_from([7, 9, 5, MISSING_KEY, NO_KEY]), min_size=1), st.sampled_from([1, 3]), st.booleans())
def test_the_same_ids_and_counts(keys: list[int], slots: int, beside: bool) -> None:
    """Of single values beside a list, which may have one slot, and that slot no value."""
    listed = np.stack([np.roll(np.array(keys), at) for at in range(slots)], axis=1)
    single = np.where(listed[:, :1] == NO_KEY, 5, listed[:, :1])
    columns = {"tags": listed} | ({"item": single} if beside else {})
    signature = {
        "columns": {name: "list<int64>" if name == "tags" else "int64" for name in columns},
        "keys": list(columns),
        "numbers": [],
        "slots": {"tags": slots},
        "newest": [],
    }
    steps = [{"name": n, "kind": "vocabulary", "table": "all", "column": n, "weights": None} for n in columns]
    state = {"signature": signature, "features": steps, "dense": []}
    packed = Packed(np.concatenate(list(columns.values()), axis=1), np.empty((len(keys), 0)))
    known = np.array([7, 9]), np.array([1, 2])
    wanted = Transform(state, {"all": Vocabulary(*known)}).apply(packed)
    found = scaling.FastTransform(state, {"all": CompiledVocabulary(*known)}).apply(packed)
    for name in ("ids", "missing", "unseen"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
