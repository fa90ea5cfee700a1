"""Metrics of binary predictions, exact and in float64, on all rows of a split at once."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Metrics = dict[str, float | str | None]


def auc(labels: Floats, logits: Floats) -> float | None:
    """Share of (positive, negative) pairs in the right order, ties counting half; None where there is one class."""
    positives = float(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return None
    _, group, count = np.unique(logits, return_inverse=True, return_counts=True)
    average_rank = np.cumsum(count) - (count - 1) / 2
    rank_sum = float(average_rank[group][labels == 1].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def binary_metrics(labels: Floats, logits: Floats) -> Metrics:
    """auc, logloss, ne, calibration and accuracy at probability one half, of rows [R].

    ne is the logloss over the entropy of the base rate (He et al. 2014); calibration the mean probability over the base
    rate. What one class alone leaves undefined is None, with the reason beside it under `<metric>_reason`.
    """
    rate = float(labels.mean())
    logloss = float((np.maximum(logits, 0) - logits * labels + np.log1p(np.exp(-np.abs(logits)))).mean())
    probability = 1 / (1 + np.exp(-logits))
    defined = 0 < rate < 1
    found: Metrics = {
        "auc": auc(labels, logits),
        "logloss": logloss,
        "ne": logloss / -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)) if defined else None,
        "calibration": float(probability.mean()) / rate if rate > 0 else None,
        "accuracy": float(((logits > 0) == (labels == 1)).mean()),
    }
    reasons = {f"{name}_reason": f"all labels are {rate:.0f}" for name, value in found.items() if value is None}
    return found | reasons


def task_metrics(tasks: Sequence[str], *, labels_RT: Floats, logits_RT: Floats) -> Metrics:
    """The metrics of every task; with several tasks the keys begin with `<task>/`."""
    found: Metrics = {}
    for at, task in enumerate(tasks):
        prefix = f"{task}/" if len(tasks) > 1 else ""
        found |= {
            f"{prefix}{name}": value for name, value in binary_metrics(labels_RT[:, at], logits_RT[:, at]).items()
        }
    return found
