"""AUC of more rows than fit into memory: a histogram of logits that batches, files and ranks add up."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from recsys.metrics import Floats, auc_of_masses, counted_rows


@dataclass(eq=False)
class StreamingAUC:
    """Weights of positives and negatives in equally wide bins of the logit; the outermost hold what lies beyond.

    Logits of one bin count as ties. So the AUC is exact but for the pairs within a bin, each wrong by at most one half:
    `max_error` says how much that is. Two logits within +-limit that are more than 2 limit / bins apart (0.0005 by
    default) are never taken for equal. States of the same bins and limit add up: `merge` them, or sum `masses_2C` over
    ranks in place.
    """

    bins: int = 65_536
    limit: float = 16.0
    masses_2C: Floats = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.masses_2C = np.zeros((2, self.bins))

    def update(self, labels: npt.ArrayLike, logits: npt.ArrayLike, *, weights: npt.ArrayLike | None = None) -> None:
        """Counts rows [R]. Raises ValueError as `counted_rows`, and then counts none of them."""
        y, x, w = counted_rows(labels, logits, weights=weights)
        clipped = np.clip(x, -self.limit, self.limit)
        place = np.minimum((clipped + self.limit) * (self.bins / (2 * self.limit)), self.bins - 1).astype(np.int64)
        self.masses_2C[0] += np.bincount(place, w * y, self.bins)
        self.masses_2C[1] += np.bincount(place, w * (1 - y), self.bins)

    def merge(self, other: "StreamingAUC") -> None:
        """Adds the rows that `other` has counted. Raises ValueError where its bins are others."""
        if (self.bins, self.limit) != (other.bins, other.limit):
            ours, theirs = (f"{state.bins} bins within +-{state.limit}" for state in (self, other))
            raise ValueError(f"{theirs} cannot be added to {ours}")
        self.masses_2C += other.masses_2C

    def value(self) -> float | None:
        """AUC of the rows so far; None where there is one class."""
        return auc_of_masses(*self.masses_2C)

    def max_error(self) -> float | None:
        """How far `value` can be from the exact AUC: half the share of (positive, negative) pairs within a bin."""
        positive_C, negative_C = self.masses_2C
        pairs = float(positive_C.sum()) * float(negative_C.sum())
        return float((positive_C * negative_C).sum()) / pairs / 2 if pairs else None
