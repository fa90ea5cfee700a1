"""Metrics against their definitions, pair by pair and row by row, TensorFlow's figures, and laws."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.metrics import Floats, Metrics, auc, binary_metrics, ece, gauc, pr_auc, task_metrics, tf200_auc
from recsys.streaming_auc import StreamingAUC
from tests.golden.case import load

# label, logit in quarters, weight, group
ROW = st.tuples(st.sampled_from([0.0, 1.0]), st.integers(-8, 8), st.integers(0, 3), st.integers(0, 3))
Rows = tuple[Floats, Floats, Floats, Floats]
ALL = {"auc", "logloss", "ne", "calibration", "accuracy", "pr_auc", "ece", "tf200_auc"}


def columns(rows: list[tuple[float, int, int, int]]) -> Rows:
    labels, quarters, weights, groups = np.array(rows, np.float64).T
    return labels, quarters / 4, weights, groups


ROWS = st.lists(ROW, min_size=1, max_size=50).map(columns)


def sigmoid(logits: Floats) -> Floats:
    return 1 / (1 + np.exp(-logits))


def pairs_in_order(labels: Floats, logits: Floats, weights: Floats) -> float | None:
    each = [
        (weights[p] * weights[n], 1.0 if logits[p] > logits[n] else 0.5 if logits[p] == logits[n] else 0.0)
        for p in np.flatnonzero(labels == 1)
        for n in np.flatnonzero(labels == 0)
    ]
    total = sum(weight for weight, _ in each)
    return sum(weight * order for weight, order in each) / total if total else None


def precisions(labels: Floats, logits: Floats, weights: Floats) -> float | None:
    positives = [at for at in np.flatnonzero(labels == 1) if weights[at]]
    above = {at: logits >= logits[at] for at in positives}
    each = [weights[at] * (weights * labels)[above[at]].sum() / weights[above[at]].sum() for at in positives]
    return sum(each) / weights[positives].sum() if positives else None


def same(found: Any, wanted: Any, *, error: float = 1e-12) -> None:
    assert found == (None if wanted is None else pytest.approx(wanted, rel=error, abs=error))


def alike(found: Metrics, wanted: Metrics, *, error: float = 1e-9) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert value == (pytest.approx(wanted[name], abs=error) if isinstance(value, float) else wanted[name]), name


@given(rows=ROWS)
def test_auc_counts_pairs_and_ties_half(rows: Rows) -> None:
    labels, logits, weights, _ = rows
    same(auc(labels, logits, weights=weights), pairs_in_order(labels, logits, weights))
    same(auc(labels, logits), pairs_in_order(labels, logits, np.ones_like(labels)))


@given(rows=ROWS)
def test_pr_auc_is_the_mean_precision_at_the_positives(rows: Rows) -> None:
    labels, logits, weights, _ = rows
    same(pr_auc(labels, logits, weights=weights), precisions(labels, logits, weights))
    same(pr_auc(labels, logits), precisions(labels, logits, np.ones_like(labels)))


@pytest.mark.parametrize("weighted", [False, True])
@given(rows=ROWS)
def test_gauc_is_the_weighted_mean_of_the_groups_aucs(rows: Rows, weighted: bool) -> None:
    labels, logits, weights, groups = rows
    own = weights if weighted else np.ones_like(weights)
    parts = [groups == group for group in sorted(set(groups))]
    each = [(pairs_in_order(labels[at], logits[at], own[at]), own[at].sum()) for at in parts]
    kept = [(value, weight) for value, weight in each if value is not None]
    wanted = sum(value * weight for value, weight in kept) / sum(weight for _, weight in kept) if kept else None
    for ids in (groups, groups.astype(str)):
        same(gauc(labels, logits, groups=ids, weights=weights if weighted else None), wanted)


def test_gauc_of_one_group_is_the_auc_and_of_single_rows_undefined() -> None:
    labels, logits = np.array([1.0, 0.0, 1.0, 0.0]), np.array([0.4, 0.1, 0.2, 0.3])
    assert gauc(labels, logits, groups=np.zeros(4, np.int64)) == auc(labels, logits) == 0.75
    found = binary_metrics(labels, logits, groups=np.arange(4))
    assert (found["gauc"], found["gauc_reason"]) == (None, "no group has both labels")


@given(rows=ROWS, bins=st.integers(1, 25))
def test_ece_of_equally_wide_bins(rows: Rows, bins: int) -> None:
    labels, logits, weights, _ = rows
    chances, wanted = sigmoid(logits), 0.0
    for at in range(bins):
        inside = (chances >= at / bins) & (chances < (at + 1) / bins)
        if share := weights[inside].sum():
            gap = np.average(chances[inside], weights=weights[inside]) - np.average(
                labels[inside], weights=weights[inside]
            )
            wanted += share / weights.sum() * abs(gap)
    same(ece(labels, chances, weights=weights, bins=bins), wanted if weights.any() else None)


@given(labels=st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=12), bins=st.integers(1, 6))
def test_ece_of_equal_mass_bins(labels: list[float], bins: int) -> None:
    """Each bin holds the next as many rows; a rising score makes the wanted bins plain slices."""
    y = np.tile(labels, bins)
    chances = np.linspace(0.2, 0.3, len(y))
    parts = zip(np.split(chances, bins), np.split(y, bins), strict=True)
    wanted = sum(abs(p.mean() - rate.mean()) for p, rate in parts) / bins
    backwards = slice(None, None, -1)
    same(ece(y[backwards], chances[backwards], bins=bins, equal_mass=True), wanted)


def test_ece_keeps_equal_probabilities_together_and_has_the_last_edge_inside() -> None:
    labels = np.array([0.0, 1.0, 0.0, 1.0])
    assert ece(labels, np.full(4, 0.5), bins=4, equal_mass=True) == 0.0
    assert ece(labels, np.array([0.0, 1.0, 0.0, 1.0])) == 0.0
    assert ece(labels, np.array([1.0, 1.0, 1.0, 0.95])) == pytest.approx(0.5 - 0.05 / 4)


@pytest.mark.parametrize("batches", [1, 2, 3])
@pytest.mark.parametrize(("weighted", "wanted"), [(False, "auc_streaming"), (True, "auc_weighted")])
def test_tf200_auc_is_tensorflows(batches: int, weighted: bool, wanted: str) -> None:
    z, rows = load("auc"), slice(20 * batches)
    weights = z["in/weights"][rows] if weighted else None
    found = tf200_auc(z["in/labels"][rows], z["in/preds"][rows], weights=weights)
    assert found == pytest.approx(float(z[f"out/{wanted}"][batches - 1]), abs=3e-7)


def test_tf200_auc_of_narrow_scores_and_of_one_class_is_tensorflows() -> None:
    z = load("auc")
    one, zero = np.ones(60), np.zeros(60)
    for labels, scores, name in (
        (z["in/labels2"], z["in/preds2"], "narrow"),
        (one, z["in/preds"], "all_positive"),
        (zero, z["in/preds"], "all_negative"),
    ):
        assert tf200_auc(labels, scores) == pytest.approx(float(z[f"out/auc_{name}"][0]), abs=3e-7)
    assert auc(z["in/labels2"], z["in/preds2"]) == pytest.approx(float(z["out/exact_narrow"]), abs=1e-12)


def test_exact_auc_is_sklearns() -> None:
    z = load("auc")
    assert auc(z["in/labels"], z["in/preds"]) == pytest.approx(float(z["out/exact"]), abs=1e-12)
    found = auc(z["in/labels"], z["in/preds"], weights=z["in/weights"])
    assert found == pytest.approx(float(z["out/exact_weighted"]), abs=1e-7)  # sklearn summed in float32


@given(rows=ROWS, data=st.data())
def test_tf200_auc_counts_above_each_threshold(rows: Rows, data: st.DataObject) -> None:
    """Of scores on thresholds and halfway between them; one on a threshold is not above it."""
    labels, _, weights, _ = rows
    near = st.integers(196, 203)
    chances = np.array(data.draw(st.lists(near, min_size=len(labels), max_size=len(labels)))) / 398
    thresholds = np.float32([-1e-7, *(at / 199 for at in range(1, 199)), 1 + 1e-7])
    above = chances.astype(np.float32) > thresholds[:, None]
    true, false = (above * weights * labels).sum(1), (above * weights * (1 - labels)).sum(1)
    tpr, fpr = (true + 1e-6) / (true[0] + 1e-6), false / (false[0] + 1e-6)
    area = sum((fpr[at] - fpr[at + 1]) * (tpr[at] + tpr[at + 1]) / 2 for at in range(199))
    same(tf200_auc(labels, chances, weights=weights), area)


STEPS: dict[str, Callable[[Floats], Floats]] = {"line": lambda x: 3 * x - 7, "exp": np.exp, "cube": lambda x: x**3}


@given(rows=ROWS, step=st.sampled_from(sorted(STEPS)))
def test_ranking_metrics_see_the_order_alone(rows: Rows, step: str) -> None:
    labels, logits, weights, groups = rows
    moved = STEPS[step](logits)
    assert auc(labels, moved, weights=weights) == auc(labels, logits, weights=weights)
    assert pr_auc(labels, moved, weights=weights) == pr_auc(labels, logits, weights=weights)
    assert gauc(labels, moved, groups=groups) == gauc(labels, logits, groups=groups)
    both = auc(labels, logits), auc(1 - labels, logits)
    assert both == (None, None) or sum(both) == pytest.approx(1)


@given(rows=ROWS)
def test_a_row_of_weight_k_counts_as_k_rows(rows: Rows) -> None:
    labels, logits, weights, groups = rows
    at = np.repeat(np.arange(len(labels)), weights.astype(np.int64))
    repeated = binary_metrics(labels[at], logits[at], groups=groups[at])
    alike(binary_metrics(labels, logits, weights=weights, groups=groups), repeated)
    for equal_mass in (False, True):
        same(
            ece(labels, sigmoid(logits), weights=weights, equal_mass=equal_mass),
            ece(labels[at], sigmoid(logits)[at], equal_mass=equal_mass),
        )


@given(rows=ROWS, scale=st.floats(0.01, 100), seed=st.integers(0, 9))
def test_neither_the_order_of_rows_nor_the_unit_of_weights_counts(rows: Rows, scale: float, seed: int) -> None:
    labels, logits, weights, groups = rows
    at = np.random.default_rng(seed).permutation(len(labels))
    found = binary_metrics(labels[at], logits[at], weights=weights[at] * scale, groups=groups[at])
    wanted = binary_metrics(labels, logits, weights=weights, groups=groups)
    alike(found, wanted, error=1e-3)  # tf200_auc adds 1e-6 to sums of weights
    alike(found | {"tf200_auc": 0.0}, wanted | {"tf200_auc": 0.0})


def test_figures_by_hand() -> None:
    labels, logits = np.array([1.0, 0.0, 1.0, 0.0]), np.array([2.0, -1.0, -0.5, 0.5])
    found = binary_metrics(labels, logits)
    chances = [1 / (1 + math.exp(-logit)) for logit in logits]
    loss = -sum(math.log(p if y else 1 - p) for p, y in zip(chances, labels, strict=True)) / 4
    assert found["logloss"] == pytest.approx(loss, abs=1e-15)
    assert found["ne"] == pytest.approx(loss / math.log(2))
    assert found["calibration"] == pytest.approx(sum(chances) / 2)
    assert found["accuracy"] == 0.5
    assert found["auc"] == 0.75
    assert found["pr_auc"] == pytest.approx((1 + 2 / 3) / 2)
    wanted = pytest.approx(sum(abs(chances - labels)) / 4, abs=1e-12)
    assert found["ece"] == wanted and ece(labels, np.array(chances)) == wanted
    assert found["tf200_auc"] == pytest.approx(0.75, abs=1e-5)
    assert found.keys() == ALL


def test_a_probability_of_one_half_predicts_no_click() -> None:
    assert binary_metrics(np.array([0.0, 0.0, 1.0]), np.zeros(3))["accuracy"] == pytest.approx(2 / 3)


def test_extreme_logits_give_finite_loss() -> None:
    assert binary_metrics(np.array([0.0, 1.0]), np.array([900.0, -900.0]))["logloss"] == 900.0


@pytest.mark.parametrize(
    ("label", "undefined"),
    [(0.0, {"auc", "ne", "calibration", "pr_auc", "tf200_auc"}), (1.0, {"auc", "ne", "tf200_auc"})],
)
def test_one_class_gives_null_and_the_reason(label: float, undefined: set[str]) -> None:
    found = binary_metrics(np.full(3, label), np.array([0.1, 0.2, 0.3]))
    assert {name for name, value in found.items() if value is None} == undefined
    assert all(found[f"{name}_reason"] == f"all labels are {label:.0f}" for name in undefined)


def test_several_tasks_have_prefixed_keys() -> None:
    labels, logits = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([[-1.0, -1.0], [1.0, 1.0]])
    found = task_metrics(["click", "buy"], labels_RT=labels, logits_RT=logits)
    assert (found["click/auc"], found["buy/auc"]) == (1.0, 0.0)


def test_a_tasks_rows_are_those_of_its_weights() -> None:
    """Purchases are known of clicked rows alone; what the other rows hold does not matter, even if it is no number."""
    labels = np.array([[1.0, 1.0], [1.0, 0.0], [0.0, np.nan], [0.0, -1.0]])
    logits = np.array([[0.3, 0.2], [0.2, 0.1], [0.25, np.inf], [0.0, np.nan]])
    weights, groups = np.array([[1.0, 2.0], [1.0, 1.0], [1.0, 0.0], [1.0, 0.0]]), np.array(["u", "u", "v", "v"])
    given_ = {"labels_RT": labels, "logits_RT": logits, "weights_RT": weights, "groups_R": groups}
    found = task_metrics(["click", "buy"], **given_)
    buy = binary_metrics(labels[:2, 1], logits[:2, 1], weights=weights[:2, 1], groups=groups[:2])
    click = binary_metrics(labels[:, 0], logits[:, 0], groups=groups)
    assert found == {f"click/{k}": v for k, v in click.items()} | {f"buy/{k}": v for k, v in buy.items()}
    assert (click["auc"], click["gauc"], buy["auc"]) == (0.75, None, 1.0)


def test_a_task_without_rows_has_no_figure() -> None:
    rows = {"labels_RT": np.ones((3, 1)), "logits_RT": np.ones((3, 1)), "weights_RT": np.zeros((3, 1))}
    found = task_metrics(["buy"], **rows, groups_R=np.zeros(3))
    names = ALL | {"gauc"}
    assert found == dict.fromkeys(names) | {f"{name}_reason": "no rows" for name in names}


@pytest.mark.parametrize(
    ("label", "logit", "weight", "message"),
    [
        (0.0, np.nan, 1.0, "1 of 3 predictions are NaN or infinite"),
        (0.0, -np.inf, 1.0, "1 of 3 predictions are NaN or infinite"),
        (0.5, 0.0, 1.0, "1 of 3 labels are neither 0 nor 1"),
        (np.nan, np.nan, 1.0, "1 of 3 predictions are NaN or infinite; 1 of 3 labels"),
        (0.0, 0.0, -1.0, "1 of 3 weights are negative, NaN or infinite"),
        (0.0, 0.0, np.nan, "1 of 3 weights are negative, NaN or infinite"),
    ],
)
def test_faulty_rows_are_counted(label: float, logit: float, weight: float, message: str) -> None:
    labels, logits, weights = np.array([1.0, label, 0.0]), np.array([0.5, logit, 0.1]), np.array([1.0, weight, 1.0])
    for metric in (auc, pr_auc, ece, tf200_auc, binary_metrics, StreamingAUC().update):
        with pytest.raises(ValueError, match=message):
            metric(labels, logits, weights=weights)
    with pytest.raises(ValueError, match=message):
        gauc(labels, logits, groups=np.zeros(3), weights=weights)
    rows = {"labels_RT": labels[:, None], "logits_RT": logits[:, None], "weights_RT": weights[:, None]}
    with pytest.raises(ValueError, match=f"task 'buy': {message}"):
        task_metrics(["buy"], **rows)


def test_columns_must_be_as_long() -> None:
    with pytest.raises(ValueError, match="must be as many"):
        auc(np.zeros(3), np.zeros((3, 1)))
