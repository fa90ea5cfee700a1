"""Hands the counts of an instance to Triton, which shows them as Prometheus text on its metrics port.

Copied into a bundle, so it imports nothing of ours. A call to Triton costs some 50 us, so a thread makes them every
two seconds, and none for what did not change.
"""

import threading
from collections.abc import Mapping
from typing import Any

_EVERY_S = 2.0
COUNTERS = {
    "rankforge_rows_total": "Rows scored",
    "rankforge_refused_requests_total": "Requests answered with INVALID_ARG",
    "rankforge_values_total": "Values by feature: known, missing, unseen (no row of their own) or clipped",
    "rankforge_score_bucket": "Scores of a task that are at most le",
    "rankforge_score_count": "Scores of a task",
    "rankforge_score_sum": "Sum of the scores of a task",
}
GAUGES = {
    "rankforge_drift_psi": "Population stability index of recent scores or values against the validation rows",
    "rankforge_drift_alarm": "1 where the index is above the threshold in [serve]",
}


class Exporter:
    """Counters of a model version, shared by its instances, and gauges of this instance."""

    def __init__(self, monitor: Any, pb_utils: Any, *, labels: Mapping[str, str], instance: str, alarm: float) -> None:
        self._monitor, self._labels, self._instance, self._alarm = monitor, dict(labels), instance, alarm
        kind = pb_utils.MetricFamily
        self._families = {name: kind(name=name, description=text, kind=kind.COUNTER) for name, text in COUNTERS.items()}
        self._families |= {name: kind(name=name, description=text, kind=kind.GAUGE) for name, text in GAUGES.items()}
        self._series: dict[tuple[str, tuple[tuple[str, str], ...]], Any] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        for name in ("rankforge_rows_total", "rankforge_refused_requests_total"):
            self._of(name, {})  # to be found at 0 before the first request
        self._thread.start()

    def stop(self) -> None:
        """Hands over the last counts and lets Triton delete the series, which it does before their families."""
        self._stop.set()
        self._thread.join()
        self.flush()
        self._series.clear()

    def flush(self) -> None:
        """What changed since the last time."""
        for (name, labels), count in self._monitor.take().items():
            if count:
                self._of(name, dict(labels)).increment(count)
        for (subject, name), index in self._monitor.drift().items():
            labels = {"of": subject, "name": name, "instance": self._instance}
            self._of("rankforge_drift_psi", labels).set(index)
            self._of("rankforge_drift_alarm", labels).set(float(index > self._alarm))

    def _run(self) -> None:
        while not self._stop.wait(_EVERY_S):
            self.flush()

    def _of(self, name: str, labels: Mapping[str, str]) -> Any:
        key = (name, tuple(sorted(labels.items())))
        if key not in self._series:
            self._series[key] = self._families[name].Metric(labels={**self._labels, **labels})
        return self._series[key]
