"""The streaming AUC against the exact one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.metrics import auc
from recsys.streaming_auc import StreamingAUC

ROW = st.tuples(st.sampled_from([0.0, 1.0]), st.floats(-5, 5), st.integers(0, 3))
ROWS = st.lists(ROW, min_size=1, max_size=60).map(lambda rows: np.array(rows, np.float64).T)
SHAPES = st.sampled_from([(1, 1.0), (3, 0.5), (16, 2.0), (64, 4.0), (65_536, 16.0)])


@pytest.mark.parametrize("weighted", [False, True])
@given(rows=ROWS, shape=SHAPES)
def test_it_is_exact_within_the_error_that_it_states(
    rows: np.ndarray, shape: tuple[int, float], weighted: bool
) -> None:
    labels, logits, counts = rows
    weights = counts if weighted else None
    streaming = StreamingAUC(*shape)
    streaming.update(labels, logits, weights=weights)
    exact, error = auc(labels, logits, weights=weights), streaming.max_error()
    if exact is None or error is None:
        assert streaming.value() is exact is error is None
    else:
        assert streaming.value() == pytest.approx(exact, abs=error + 1e-12)


@given(rows=ROWS)
def test_distinct_bins_and_ties_are_exact(rows: np.ndarray) -> None:
    """Whole numbers lie in bins of their own; equal ones are ties, which count half in both."""
    labels, logits, weights = rows
    whole = np.round(logits)
    streaming = StreamingAUC()
    streaming.update(labels, whole, weights=weights)
    exact = auc(labels, whole, weights=weights)
    assert streaming.value() == (None if exact is None else pytest.approx(exact, abs=1e-12))


@given(rows=ROWS, ranks=st.integers(1, 4))
def test_states_of_ranks_and_batches_add_up(rows: np.ndarray, ranks: int) -> None:
    labels, logits, weights = rows
    whole, total = StreamingAUC(), StreamingAUC()
    whole.update(labels, logits, weights=weights)
    for rank in range(ranks):
        part = StreamingAUC()
        for start in (rank, rank + ranks):
            batch = slice(start, None, 2 * ranks)
            part.update(labels[batch], logits[batch], weights=weights[batch])
        total.merge(part)
    assert np.array_equal(total.masses_2C, whole.masses_2C)
    assert (total.value(), total.max_error()) == (whole.value(), whole.max_error())


def test_the_error_is_as_large_as_it_can_be_in_one_bin() -> None:
    streaming = StreamingAUC(bins=1)
    streaming.update([1, 0], [2.0, -2.0])
    assert (streaming.value(), streaming.max_error(), auc([1, 0], [2.0, -2.0])) == (0.5, 0.5, 1.0)


@pytest.mark.parametrize("far", [16.0, 17.0, 1e300])
def test_logits_beyond_the_limit_are_in_the_outermost_bins(far: float) -> None:
    streaming = StreamingAUC()
    streaming.update([1, 0], [far, -far])
    assert streaming.masses_2C[0, -1] == streaming.masses_2C[1, 0] == 1
    assert (streaming.value(), streaming.max_error()) == (1.0, 0.0)


def test_ordinary_click_rates_are_told_apart() -> None:
    """Scores of 0.03 +- 0.002, where the 200 thresholds of TensorFlow fail."""
    rng = np.random.default_rng(0)
    logits = rng.normal(-3.5, 0.07, 20_000)
    labels = (rng.random(20_000) < 1 / (1 + np.exp(-logits))).astype(np.float64)
    streaming = StreamingAUC()
    streaming.update(labels, logits)
    exact = auc(labels, logits)
    assert streaming.value() == pytest.approx(exact, abs=1e-4) and exact is not None and exact > 0.51
    assert streaming.max_error() < 0.002


@pytest.mark.parametrize("other", [StreamingAUC(bins=8), StreamingAUC(limit=8.0)])
def test_states_of_other_bins_are_refused(other: StreamingAUC) -> None:
    with pytest.raises(ValueError, match="cannot be added"):
        StreamingAUC().merge(other)
