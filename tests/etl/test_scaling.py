"""Numbers scaled by compiled loops beside the served transform's way."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from etl.engines import scaling
from etl.transform import MISSING_NUMBER, as_columns, scale

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
