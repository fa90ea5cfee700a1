"""Exact metrics over a whole split, in float64."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64s = npt.NDArray[np.float64]
Figures = dict[str, float | None]


@dataclass(frozen=True)
class Scored:
    """Rows in file order: logits and labels float64 [R, T]."""

    logits_RT: Float64s
    labels_RT: Float64s


def figures(scored: Scored, tasks: Sequence[str]) -> Figures:
    """`auc`, `logloss`, `ne`, `calibration`, `accuracy`, prefixed `<task>/` where there are several tasks.

    What one class alone leaves undefined is None, for JSON has no NaN.
    """
    found: Figures = {}
    for at, task in enumerate(tasks):
        prefix = f"{task}/" if len(tasks) > 1 else ""
        of_task = binary_figures(scored.logits_RT[:, at], scored.labels_RT[:, at])
        found |= {f"{prefix}{name}": value for name, value in of_task.items()}
    return found


def binary_figures(logits: Float64s, labels: Float64s) -> Figures:
    """The figures of one task; AUC and NE are None where the labels hold one class only."""
    loss = logloss(logits, labels)
    base = float(labels.mean())
    shared: Figures = {"logloss": loss, "accuracy": float(np.mean((logits > 0) == (labels > 0.5)))}
    calibration = float(sigmoid(logits).mean()) / base if base > 0 else None
    if base in (0.0, 1.0):
        return {"auc": None, "ne": None, "calibration": calibration, **shared}
    entropy = -(base * np.log(base) + (1 - base) * np.log1p(-base))
    return {"auc": auc(logits, labels), "ne": loss / float(entropy), "calibration": calibration, **shared}


def auc(scores: Float64s, labels: Float64s) -> float:
    """Share of (positive, negative) pairs in the right order, ties a half (Mann-Whitney); both classes must be there."""
    _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    last_rank = np.cumsum(sizes)
    mean_rank = (last_rank - (sizes - 1) / 2)[group]
    positives = labels > 0.5
    ones = int(positives.sum())
    above = float(mean_rank[positives].sum()) - ones * (ones + 1) / 2
    return above / (ones * (len(labels) - ones))


def logloss(logits: Float64s, labels: Float64s) -> float:
    """Mean binary cross entropy, from logits so that no probability rounds to 0 or 1."""
    return float(np.mean(np.logaddexp(0.0, logits) - labels * logits))


def sigmoid(logits: Float64s) -> Float64s:
    """Probabilities, without overflow."""
    probabilities: Float64s = np.exp(-np.logaddexp(0.0, -logits))
    return probabilities
