"""What a person sees of training: a live line on a terminal, a plain log line now and then elsewhere. Rank 0 alone."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)


class Display(Protocol):
    """Hears of each logged step."""

    def __call__(self, text: str, step: int) -> None: ...


@contextlib.contextmanager
def display(steps: int, *, is_shown: bool) -> Iterator[Display]:
    """Shows progress towards `steps` while the block runs."""
    if not is_shown:
        yield _nothing
    elif sys.stderr.isatty():
        yield from _live(steps)
    else:
        yield lambda text, step: log.info("step %d of %d: %s", step, steps, text)


def _nothing(text: str, step: int) -> None:
    """The other ranks."""


def _live(steps: int) -> Iterator[Display]:
    columns = (BarColumn(), TextColumn("{task.completed}/{task.total} {task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=steps)
        yield lambda text, step: bar.update(task, completed=step, description=text)
