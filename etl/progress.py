"""What a job says on the way: a line a stage with rows, rows/s and the time left."""

import sys
import time
from collections.abc import Callable
from typing import Any

_EVERY_S = 30.0


class Progress:
    """Rows, rows/s, and the time left where all rows are known or estimated. Hears of a stage first when it begins.

    On a terminal a line a stage moves, elsewhere a plain line is printed every 30 seconds.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun: dict[str, float] = {}
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        self._said = self._clock()
        if sys.stderr.isatty():
            self._bar = _bar()
            self._bar.start()
        return self

    def __call__(self, stage: str, rows: int, *, total: int | None = None) -> None:
        now = self._clock()
        first = stage not in self._begun
        begun = self._begun.setdefault(stage, now)
        rate = rows / max(now - begun, 1e-3)
        if self._bar is not None:
            if first:
                self._bar.add_task(stage, total=total, rate=0.0)
            at = list(self._begun).index(stage)
            self._bar.update(self._bar.tasks[at].id, completed=rows, total=total, rate=rate)
        elif now - self._said >= _EVERY_S:
            self._said = now
            sys.stderr.write(_line(stage, rows, total=total, rate=rate))
            sys.stderr.flush()

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _line(stage: str, rows: int, *, total: int | None, rate: float) -> str:
    parts = [f"{stage}: {rows:,} rows", f"{rate:,.0f} rows/s"]
    if total is not None and rate:
        minutes, seconds = divmod(round(max(total - rows, 0) / rate), 60)
        parts.append(f"{minutes}:{seconds:02d} left")
    return ", ".join(parts) + "\n"


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed:,} rows"))
    rate, left = TextColumn("{task.fields[rate]:,.0f} rows/s"), TextColumn("left")
    times = (TimeElapsedColumn(), TimeRemainingColumn(), left)
    return Bar(*columns, rate, *times, console=Console(stderr=True), transient=True)
