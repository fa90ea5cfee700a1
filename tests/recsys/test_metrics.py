"""Metrics against their definitions, pair by pair and row by row."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.metrics import auc, binary_metrics, task_metrics

ROWS = st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.integers(-4, 4)), min_size=2, max_size=60)


@given(rows=ROWS)
def test_auc_counts_pairs_and_ties_half(rows: list[tuple[float, int]]) -> None:
    labels, logits = (np.array(column, np.float64) for column in zip(*rows, strict=True))
    pairs = [(p, n) for p in logits[labels == 1] for n in logits[labels == 0]]
    wanted = sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs) if pairs else None
    assert auc(labels, logits) == pytest.approx(wanted) if pairs else auc(labels, logits) is None


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


def test_extreme_logits_give_finite_loss() -> None:
    assert binary_metrics(np.array([0.0, 1.0]), np.array([700.0, -700.0]))["logloss"] == 700.0


@pytest.mark.parametrize(("label", "undefined"), [(0.0, {"auc", "ne", "calibration"}), (1.0, {"auc", "ne"})])
def test_one_class_gives_null_and_the_reason(label: float, undefined: set[str]) -> None:
    found = binary_metrics(np.full(3, label), np.array([0.1, 0.2, 0.3]))
    assert {name for name, value in found.items() if value is None} == undefined
    assert all(found[f"{name}_reason"] == f"all labels are {label:.0f}" for name in undefined)


def test_several_tasks_have_prefixed_keys() -> None:
    labels, logits = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([[-1.0, -1.0], [1.0, 1.0]])
    found = task_metrics(["click", "buy"], labels_RT=labels, logits_RT=logits)
    assert (found["click/auc"], found["buy/auc"]) == (1.0, 0.0)
