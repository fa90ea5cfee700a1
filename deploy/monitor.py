"""What an instance of the served model counts: values by feature, scores, and their drift against training.

Copied into a bundle, so it imports nothing of ours. `Monitor` adds up arrays while requests wait and sorts them into
series in another thread, which `deploy/exporter.py` runs.
"""

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
Float32s = npt.NDArray[np.float32]
State = Mapping[str, Any]
"""JSON values."""
Series = tuple[str, tuple[tuple[str, str], ...]]
"""A metric's name, and names and values of its labels."""

SCORE_EDGES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
LEAST_ROWS = 1000
"""Recent rows below which no drift is told: in ten bins chance alone makes an index of about 9 / rows."""
_FULL = 10_000
_SAMPLED = 1024
"""Rows whose numbers are kept until they are read, every two seconds: all of them would cost each request."""


def psi(expected: npt.ArrayLike, actual: npt.ArrayLike) -> float:
    """Population stability index sum((p - q) ln(p / q)) of two sets of counts in the same bins, half a count added."""
    p, q = ((part + 0.5) / (part + 0.5).sum() for part in (np.asarray(expected, float), np.asarray(actual, float)))
    return float(((p - q) * np.log(p / q)).sum())


def binned(value_B: Float32s, edges: Sequence[float]) -> Int64s:
    """Counts [K + 1] of values between K ascending edges; an edge opens the bin at its right."""
    at = np.searchsorted(np.asarray(edges, np.float64), value_B.astype(np.float64), side="right")
    return np.bincount(at, minlength=len(edges) + 1).astype(np.int64)


class Window:
    """Counts [K] of the newest 10,000 to 20,000 values, or of all where there were fewer."""

    def __init__(self, bins: int) -> None:
        self._older, self._newer = np.zeros(bins, np.int64), np.zeros(bins, np.int64)

    def add(self, counts: Int64s) -> None:
        """More recent ones."""
        self._newer = self._newer + counts
        if self._newer.sum() >= _FULL:
            self._older, self._newer = self._newer, np.zeros_like(self._newer)

    @property
    def counts(self) -> Int64s:
        """What the window holds."""
        return self._older + self._newer


class Tally:
    """Values that went through one transform: added up as arrays, told apart by feature when they are read."""

    def __init__(self, transform: Any, *, missing_number: float, skip: frozenset[str]) -> None:
        signature = transform.signature
        self._missing_number, self._skip = missing_number, skip
        self._features = transform.features
        self._slots = [signature.slots.get(step["column"], 1) if "column" in step else 1 for step in self._features]
        places = signature.places(signature.numbers)
        scaled = [step for step in self._features if step["kind"] == "field"]
        scaled += [step for step in transform.dense if "by" not in step]
        self._numbers = [(step, places[step["column"]].start) for step in scaled if step["name"] not in skip]
        self._clipping = np.array([at for step, at in self._numbers if step["clip"]], np.int64)
        clips = [step["clip"] for step, _ in self._numbers if step["clip"]]
        self._low, self._high = np.array(clips, np.float64).reshape(-1, 2).T
        self._floats = {name: at for name, at in _float_places(transform).items() if name not in skip}
        self._clear()

    def _clear(self) -> None:
        self._sample: list[Float32s] = []
        self._rows, self._sums = 0, [np.zeros(1, np.int64)] * 4
        self._clipped = np.zeros(len(self._clipping), np.int64)

    def add(self, packed: Any, encoded: Any) -> None:
        """One batch."""
        if self._rows < _SAMPLED:
            self._sample.append(encoded.floats[: _SAMPLED - self._rows, list(self._floats.values())])
        self._rows += len(packed.keys)
        absent = np.count_nonzero(packed.numbers == self._missing_number, axis=0)
        parts = (np.count_nonzero(encoded.ids >= 0, axis=0), encoded.missing, encoded.unseen, absent)
        self._sums = [total + part for total, part in zip(self._sums, parts, strict=True)]
        number_BC = packed.numbers[:, self._clipping]
        low = (number_BC < self._low) & (number_BC != self._missing_number)
        self._clipped += np.count_nonzero(low | (number_BC > self._high), axis=0)

    def sampled(self) -> dict[str, Float32s]:
        """What the network read of each number in the first rows since the last `take`."""
        return dict(zip(self._floats, np.concatenate(self._sample).T, strict=True)) if self._sample else {}

    def take(self) -> Iterator[tuple[str, dict[str, int]]]:
        """Feature by feature what was counted since the last time."""
        (held_S, missing_F, unseen_F, absent_M), rows, clipped = self._sums, self._rows, iter(self._clipped.tolist())
        self._clear()
        if not rows:
            return
        end = 0
        for at, (step, slots) in enumerate(zip(self._features, self._slots, strict=True)):
            held, end = int(held_S[end : end + slots].sum()), end + slots
            if step["name"] not in self._skip and step["kind"] != "field":
                missing, unseen = int(missing_F[at]), int(unseen_F[at])
                yield step["name"], {"known": held - missing - unseen, "missing": missing, "unseen": unseen}
        for step, at in self._numbers:
            missing, beyond = int(absent_M[at]), next(clipped) if step["clip"] else 0
            yield step["name"], {"known": rows - missing - beyond, "missing": missing, "clipped": beyond}


def _float_places(transform: Any) -> dict[str, int]:
    """Where the one number of each dense input and each field stands among the floats; lists of weights have many."""
    places = {step["name"]: at for at, step in enumerate(transform.dense)}
    end = len(places)
    for step in transform.features:
        if step["kind"] == "field":
            places[step["name"]] = end
            end += 1
        elif step.get("weights"):
            end += transform.signature.slots[step["column"]]
    return places


class Monitor:
    """Counts since they were last taken, and windows of recent rows beside the reference of `reference.json`.

    The reference holds for each task and each number the inner edges of its bins and the counts in them, and for each
    feature counts of known, missing and unseen values. Another thread may take what this one counts.
    """

    def __init__(self, reference: State, *, tasks: Sequence[str], missing_number: float) -> None:
        self._tasks, self._missing_number = tuple(tasks), missing_number
        self._scores, self._features, self._numbers = (reference[part] for part in ("scores", "features", "numbers"))
        self._expected = {("score", task): bins["counts"] for task, bins in self._scores.items()}
        self._expected |= {("values", name): counts for name, counts in self._features.items()}
        self._expected |= {("numbers", name): bins["counts"] for name, bins in self._numbers.items()}
        self._windows = {subject: Window(len(counts)) for subject, counts in self._expected.items()}
        self._tallies: dict[int, Tally] = {}
        self._kept: list[Float32s] = []
        self._refused = 0
        self._lock = threading.Lock()

    def seen(self, transform: Any, *, packed: Any, encoded: Any, skip: frozenset[str] = frozenset()) -> None:
        """Values of a batch, before it was scored, but for those of the features to skip."""
        with self._lock:
            if id(transform) not in self._tallies:
                self._tallies[id(transform)] = Tally(transform, missing_number=self._missing_number, skip=skip)
            self._tallies[id(transform)].add(packed, encoded)

    def scored(self, score_BT: Float32s) -> None:
        """The probabilities of one answered request."""
        with self._lock:
            self._kept.append(score_BT)

    def refused(self) -> None:
        """One request that was answered with a fault."""
        with self._lock:
            self._refused += 1

    def take(self) -> Counter[Series]:
        """What was counted since the last time; the windows take it in."""
        with self._lock:
            kept, self._kept = self._kept, []
            refused, self._refused = self._refused, 0
            sampled = [pair for tally in self._tallies.values() for pair in tally.sampled().items()]
            values = [pair for tally in self._tallies.values() for pair in tally.take()]
        counts: Counter[Series] = Counter()
        counts["rankforge_refused_requests_total", ()] += refused
        for name, kinds in values:
            for kind, count in kinds.items():
                counts["rankforge_values_total", (("feature", name), ("kind", kind))] += count
            if name in self._features:
                order = ("known", "missing", "unseen")
                self._windows["values", name].add(np.array([kinds.get(kind, 0) for kind in order], np.int64))
        for name, value_B in sampled:
            if name in self._numbers:
                self._windows["numbers", name].add(binned(value_B, self._numbers[name]["edges"]))
        if kept:
            self._take_scores(np.concatenate(kept), counts)
        return counts

    def _take_scores(self, score_BT: Float32s, counts: Counter[Series]) -> None:
        counts["rankforge_rows_total", ()] += len(score_BT)
        for at, task in enumerate(self._tasks):
            score_B = score_BT[:, at]
            below = np.searchsorted(np.sort(score_B), np.asarray(SCORE_EDGES, np.float32), side="right").tolist()
            for edge, count in zip([*map(str, SCORE_EDGES), "+Inf"], [*below, len(score_B)], strict=True):
                counts["rankforge_score_bucket", (("le", edge), ("task", task))] += count
            counts["rankforge_score_count", (("task", task),)] += len(score_B)
            counts["rankforge_score_sum", (("task", task),)] += float(score_B.sum(dtype=np.float64))  # type: ignore[assignment]
            if task in self._scores:
                self._windows["score", task].add(binned(score_B, self._scores[task]["edges"]))

    def drift(self) -> dict[tuple[str, str], float]:
        """The index of tasks' scores ("score"), features' values ("values") and numbers ("numbers"), each where enough
        were seen.
        """
        recent = {subject: window.counts for subject, window in self._windows.items()}
        return {
            subject: psi(self._expected[subject], counts)
            for subject, counts in recent.items()
            if counts.sum() >= LEAST_ROWS
        }
