"""What is known of synthetic rows: rates, and the AUC that the true probabilities themselves reach."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from etl.artifact import Json
from etl.transform import Float64s, Int64s

BOUND, BINS = 16.0, 1 << 18


@dataclass
class Ranking:
    """AUC of logits that come in pieces, in constant memory.

    Logits from -16 to 16 fall into 262,144 bins, and two of one bin count as a tie: an error of about 1e-6 on ten
    thousand rows, and less on more.
    """

    counts: Int64s = field(default_factory=lambda: np.zeros((2, BINS), np.int64))

    def add(self, logits: Float64s, labels: npt.NDArray[np.bool_]) -> None:
        """Rows [B]."""
        scaled = (logits + BOUND) * (BINS / (2 * BOUND))
        bins = scaled.clip(0, BINS - 1).astype(np.int64) + BINS * labels
        self.counts += np.bincount(bins, minlength=2 * BINS).reshape(2, BINS)

    def merge(self, other: "Ranking") -> None:
        """Adds the rows of another."""
        self.counts += other.counts

    @property
    def rows(self) -> int:
        return int(self.counts.sum())

    @property
    def rate(self) -> float:
        """Share of positive rows."""
        return float(self.counts[1].sum() / self.counts.sum())

    @property
    def auc(self) -> float | None:
        """None where every label is the same."""
        negatives, positives = self.counts
        pairs = int(negatives.sum()) * int(positives.sum())
        if not pairs:
            return None
        below = np.cumsum(negatives) - negatives
        return float((positives * (below + negatives / 2)).sum() / pairs)


@dataclass(frozen=True)
class Known:
    """The true probabilities of a batch of rows and what came of them, by task.

    `logits` are those of the probabilities; `parts` those of the click where its signal ends with first-order effects,
    with pairs, and so on.
    """

    logits: dict[str, Float64s]
    labels: dict[str, npt.NDArray[np.bool_]]
    parts: dict[str, Float64s]


class Truth:
    """The figures of all rows and of each day, filled as the rows are made."""

    def __init__(self) -> None:
        self._tasks: dict[str, Ranking] = {}
        self._parts: dict[str, Ranking] = {}
        self._days: list[Json] = []

    def add_day(self, batches: Iterable[Known]) -> None:
        """The rows of the next day."""
        day: dict[str, Ranking] = {}
        for known in batches:
            for task, labels in known.labels.items():
                day.setdefault(task, Ranking()).add(known.logits[task], labels)
            for part, logits in known.parts.items():
                self._parts.setdefault(part, Ranking()).add(logits, known.labels["click"])
        for task, ranking in day.items():
            self._tasks.setdefault(task, Ranking()).merge(ranking)
        self._days.append(_figures(day) | {"day": len(self._days)})

    def as_json(self) -> Json:
        """All rows, the parts of the click's signal, and the days."""
        parts = {part: ranking.auc for part, ranking in self._parts.items()}
        return _figures(self._tasks) | {"click_auc_of_parts": parts, "days": self._days}


def _figures(tasks: dict[str, Ranking]) -> Json:
    rates = {f"{task}_rate": ranking.rate for task, ranking in tasks.items()}
    return {"rows": tasks["click"].rows, **rates, "auc": {task: ranking.auc for task, ranking in tasks.items()}}


def probability(logits: Float64s) -> Float64s:
    """The logistic function."""
    return 1 / (1 + np.exp(-logits))
