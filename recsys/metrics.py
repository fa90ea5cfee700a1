"""Metrics of binary predictions, exact and in float64, on all rows of a split at once.

Every metric takes rows [R] and optional weights [R]: a row of weight k counts as k rows, one of weight 0 not at all.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Rows = tuple[Floats, Floats, Floats]
Metrics = dict[str, float | str | None]

_TF_THRESHOLDS = np.array([-1e-7, *(at / 199 for at in range(1, 199)), 1 + 1e-7], np.float32)


def counted_rows(labels: npt.ArrayLike, predictions: npt.ArrayLike, *, weights: npt.ArrayLike | None) -> Rows:
    """Labels, predictions (logits or probabilities) and weights of the rows that count, as float64.

    Raises:
        ValueError: lengths differ, a weight is negative or not finite, or of the rows that count a label is neither 0
            nor 1 or a prediction not finite; says how many.
    """
    y, x = np.asarray(labels, np.float64), np.asarray(predictions, np.float64)
    w = np.ones_like(y) if weights is None else np.asarray(weights, np.float64)
    if not y.shape == x.shape == w.shape == (y.size,):
        raise ValueError(f"labels {y.shape}, predictions {x.shape} and weights {w.shape} must be as many")
    if bad := int((~(np.isfinite(w) & (w >= 0))).sum()):
        raise ValueError(f"{bad} of {w.size} weights are negative, NaN or infinite")
    if weights is not None:
        y, x, w = y[w > 0], x[w > 0], w[w > 0]
    faults = []
    if bad := int((~np.isfinite(x)).sum()):
        faults.append(f"{bad} of {x.size} predictions are NaN or infinite")
    if bad := int(((y != 0) & (y != 1)).sum()):
        faults.append(f"{bad} of {y.size} labels are neither 0 nor 1")
    if faults:
        raise ValueError("; ".join(faults))
    return y, x, w


def auc(labels: npt.ArrayLike, logits: npt.ArrayLike, *, weights: npt.ArrayLike | None = None) -> float | None:
    """Share of (positive, negative) pairs in the right order, ties counting half; None where there is one class."""
    return auc_of_masses(*_masses(counted_rows(labels, logits, weights=weights)))


def auc_of_masses(positive_M: Floats, negative_M: Floats) -> float | None:
    """AUC of the weights of positives and negatives at ascending scores; of one score all pairs are ties."""
    below_M = np.cumsum(negative_M) - negative_M / 2
    pairs = float(positive_M.sum()) * float(negative_M.sum())
    return float((positive_M * below_M).sum()) / pairs if pairs else None


def pr_auc(labels: npt.ArrayLike, logits: npt.ArrayLike, *, weights: npt.ArrayLike | None = None) -> float | None:
    """Average precision: the precision above each score, averaged over the positives; None where there are none.

    Rows of one score enter together; no line is drawn between the points (Davis and Goadrich 2006 say why).
    """
    positive_M, negative_M = (masses[::-1] for masses in _masses(counted_rows(labels, logits, weights=weights)))
    if not positive_M.any():
        return None
    true_M = np.cumsum(positive_M)
    precision_M = true_M / (true_M + np.cumsum(negative_M))
    return float((positive_M * precision_M).sum() / true_M[-1])


def gauc(
    labels: npt.ArrayLike, logits: npt.ArrayLike, *, groups: npt.NDArray[Any], weights: npt.ArrayLike | None = None
) -> float | None:
    """AUC within each group, averaged by the groups' weights (impressions); None where no group has both classes.

    Groups of one class are left out (the user-weighted AUC of Zhou et al. 2018). `groups` [R] may hold anything that
    sorts.
    """
    groups = groups if weights is None else groups[np.asarray(weights) > 0]
    y, x, w = counted_rows(labels, logits, weights=weights)
    if not y.size:
        return None
    _, group = np.unique(groups, return_inverse=True)
    order = np.lexsort((x, group))
    y, x, w, group = y[order], x[order], w[order], group[order]
    # M: the distinct (group, score) pairs; G: the groups.
    first = np.append(True, (group[1:] != group[:-1]) | (x[1:] != x[:-1]))
    place, group_M = np.cumsum(first) - 1, group[first]
    positive_M, negative_M = _sums(place, w * y), _sums(place, w * (1 - y))
    positive_G, negative_G = _sums(group_M, positive_M), _sums(group_M, negative_M)
    steps_M = negative_M.copy()
    steps_M[1:][group_M[1:] != group_M[:-1]] -= negative_G[:-1]  # the running sum starts anew in each group
    ordered_G = _sums(group_M, positive_M * (np.cumsum(steps_M) - negative_M / 2))
    both = (positive_G > 0) & (negative_G > 0)
    if not both.any():
        return None
    auc_G = ordered_G[both] / (positive_G[both] * negative_G[both])
    return float(np.average(auc_G, weights=(positive_G + negative_G)[both]))


def ece(
    labels: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    *,
    weights: npt.ArrayLike | None = None,
    bins: int = 20,
    equal_mass: bool = False,
) -> float | None:
    """Expected calibration error: |mean probability - rate| of each bin, averaged by weight; None without rows.

    Bins are equally wide, [k / bins, (k + 1) / bins), or of equal weight, where equal probabilities stay together in
    the bin of their middle (Naeini et al. 2015; Nguyen and O'Connor 2015).
    """
    y, p, w = counted_rows(labels, probabilities, weights=weights)
    if not y.size:
        return None
    if equal_mass:
        _, place = np.unique(p, return_inverse=True)
        mass_M = _sums(place, w)
        middle_M = (np.cumsum(mass_M) - mass_M / 2) / mass_M.sum()
        bin_R = np.minimum((middle_M * bins).astype(np.int64), bins - 1)[place]
    else:
        bin_R = np.searchsorted(np.arange(1, bins) / bins, p, side="right")
    return float(np.abs(_sums(bin_R, w * (p - y))).sum() / w.sum())


def tf200_auc(labels: npt.ArrayLike, probabilities: npt.ArrayLike, *, weights: npt.ArrayLike | None = None) -> float:
    """What `tf.metrics.auc` finds: trapezoids between 200 thresholds, compared in float32.

    For comparison with published figures alone: where scores lie close together it is far off. Rows of one class give
    0.0 (all positive) or nearly 1.0 (all negative), as there.
    """
    y, p, w = counted_rows(labels, probabilities, weights=weights)
    below = np.searchsorted(_TF_THRESHOLDS, p.astype(np.float32), side="left")  # thresholds that the row is above
    size = len(_TF_THRESHOLDS) + 1
    true, false = (_sums(below, w * side, size=size)[::-1].cumsum()[::-1][1:] for side in (y, 1 - y))
    tpr, fpr = (true + 1e-6) / ((w * y).sum() + 1e-6), false / ((w * (1 - y)).sum() + 1e-6)
    return float(((fpr[:-1] - fpr[1:]) * (tpr[:-1] + tpr[1:])).sum() / 2)


def binary_metrics(
    labels: npt.ArrayLike,
    logits: npt.ArrayLike,
    *,
    weights: npt.ArrayLike | None = None,
    groups: npt.NDArray[Any] | None = None,
) -> Metrics:
    """Every metric of rows [R]; what they leave undefined is None, with the reason under `<metric>_reason`.

    ne is the logloss over the entropy of the base rate (He et al. 2014); calibration the mean probability over the base
    rate; accuracy is at probability one half; ece has 20 equally wide bins; gauc is there where `groups` [R] are.

    Raises:
        ValueError: as `counted_rows`.
    """
    kept = slice(None) if weights is None else np.asarray(weights) > 0
    y, x, w = counted_rows(labels, logits, weights=weights)
    found: Metrics = dict.fromkeys(("auc", "logloss", "ne", "calibration", "accuracy", "pr_auc", "ece", "tf200_auc"))
    if y.size:
        found |= _figures((y, x, w))
    if groups is not None:
        found["gauc"] = gauc(y, x, groups=groups[kept], weights=w)
    one_class = f"all labels are {y[0]:.0f}" if y.size else "no rows"
    reasons = {name: one_class for name, value in found.items() if value is None}
    if "gauc" in reasons and y.size:
        reasons["gauc"] = "no group has both labels"
    return found | {f"{name}_reason": reason for name, reason in reasons.items()}


def task_metrics(
    tasks: Sequence[str],
    *,
    labels_RT: npt.NDArray[Any],
    logits_RT: npt.NDArray[Any],
    weights_RT: npt.NDArray[Any] | None = None,
    groups_R: npt.NDArray[Any] | None = None,
) -> Metrics:
    """The metrics of every task; with several tasks the keys begin with `<task>/`.

    A weight of 0 leaves a row out of one task alone, as where a conversion is only known of clicked rows.

    Raises:
        ValueError: as `counted_rows`; names the task.
    """
    found: Metrics = {}
    for at, task in enumerate(tasks):
        weights = None if weights_RT is None else weights_RT[:, at]
        try:
            figures = binary_metrics(labels_RT[:, at], logits_RT[:, at], weights=weights, groups=groups_R)
        except ValueError as fault:
            raise ValueError(f"task '{task}': {fault}") from fault
        prefix = f"{task}/" if len(tasks) > 1 else ""
        found |= {f"{prefix}{name}": value for name, value in figures.items()}
    return found


def _masses(rows: Rows) -> tuple[Floats, Floats]:
    """Weights of positives and of negatives at each distinct score, ascending: [M], [M]."""
    y, x, w = rows
    _, place = np.unique(x, return_inverse=True)
    return _sums(place, w * y), _sums(place, w * (1 - y))


def _sums(place: npt.NDArray[np.intp], values: Floats, *, size: int = 0) -> Floats:
    """Sums of the values [R] that have the same place [R]; at least `size` of them."""
    return np.bincount(place, values, size).astype(np.float64, copy=False)


def _figures(rows: Rows) -> Metrics:
    """All but gauc, of at least one row."""
    y, x, w = rows
    small = np.exp(-np.abs(x))
    probability = np.where(x >= 0, 1, small) / (1 + small)
    total, positive, negative = float(w.sum()), float((w * y).sum()), float((w * (1 - y)).sum())
    rate, rest = positive / total, negative / total
    both = positive > 0 and negative > 0
    logloss = float((w * (np.maximum(x, 0) - x * y + np.log1p(small))).sum()) / total
    return {
        "auc": auc(y, x, weights=w),
        "logloss": logloss,
        "ne": logloss / -(rate * np.log(rate) + rest * np.log(rest)) if both else None,
        "calibration": float((w * probability).sum()) / positive if positive else None,
        "accuracy": float((w * ((x > 0) == (y == 1))).sum()) / total,
        "pr_auc": pr_auc(y, x, weights=w),
        "ece": ece(y, probability, weights=w),
        "tf200_auc": tf200_auc(y, probability, weights=w) if both else None,
    }
