"""What a person sees while a model learns: a moving line on a terminal, a plain line now and then elsewhere."""

import contextlib
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from etl.artifact import Json

Report = Callable[[Json], None]
_PLAIN_EVERY_S = 10.0
_TALK = ("_fbgemm_torch_compat_table", "Could not determine LOCAL_WORLD_SIZE", "Sharding spec not found")


def quiet_libraries() -> None:
    """Silences the deprecation talk of torch and torchrec about themselves, which a user cannot mend."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
    warnings.filterwarnings("ignore", message=".*autograd kernel was not registered.*", category=UserWarning)
    warnings.filterwarnings("ignore", message="`_get_pg_default_device` will be deprecated", category=UserWarning)
    warnings.filterwarnings("ignore", message="Multiple backends are registered", category=UserWarning)
    logging.getLogger().addFilter(lambda record: not any(talk in record.getMessage() for talk in _TALK))
    for name in (
        "torch.fx._symbolic_trace",
        "torchrec.distributed.planner.types",
        "torchrec.distributed.comm",
        "torchrec.distributed.utils",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def watch() -> Iterator[Report]:
    """A function that takes training's records."""
    if sys.stderr.isatty():
        with _bar() as show:
            yield show
    else:
        yield _Plain().show


def _text(record: Json) -> str:
    parts = [f"step {record['step']:,}", f"{record['rows_per_second']:,.0f} rows/s"]
    if record.get("loss") is not None:
        parts.insert(1, f"loss {record['loss']:.4f}")
    scores = [f"{k.removeprefix('valid/')} {v:.4f}" for k, v in record.items() if _is_auc(k) and v is not None]
    return ", ".join([*parts, *scores])


def _is_auc(name: str) -> bool:
    return name.split("/")[-1] == "auc"


@contextlib.contextmanager
def _bar() -> Iterator[Report]:
    columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        scores: Json = {}

        def show(record: Json) -> None:
            scores.update({k: v for k, v in record.items() if _is_auc(k)})
            bar.update(task, description=_text(record | scores), completed=record["rows"], total=record["total_rows"])

        yield show


class _Plain:
    """Every evaluation, and a step every ten seconds."""

    def __init__(self) -> None:
        self._last = -_PLAIN_EVERY_S

    def show(self, record: Json) -> None:
        now = time.monotonic()
        if now - self._last < _PLAIN_EVERY_S and not any(name.startswith("valid/") for name in record):
            return
        self._last = now
        left = (record["total_rows"] - record["rows"]) / max(record["rows_per_second"], 1e-9)
        sys.stderr.write(f"{_text(record)}, at most {left:.0f} s left\n")
