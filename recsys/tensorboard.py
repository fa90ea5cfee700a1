"""The numbers of metrics.jsonl as TensorBoard's event files; the package `tensorboard` is optional."""

from pathlib import Path
from typing import Any

from etl.artifact import Json
from etl.faults import Fault

FOLDER = "tensorboard"


def require_tensorboard() -> Any:
    """The class that writes event files. Raises Fault where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        remedy = "pip install 'tensorboard>=2.16', or set train.tensorboard = false"
        raise Fault("train.tensorboard", got="no package 'tensorboard'", wanted="it installed", remedy=remedy) from None
    return SummaryWriter


class EventFile:
    """`tensorboard/` of a run: a scalar for each number of a line, under its name."""

    def __init__(self, run: Path, *, last_step: int) -> None:
        """TensorBoard drops what an earlier process logged after `last_step`."""
        self._writer = require_tensorboard()(str(run / FOLDER), purge_step=last_step + 1)

    def add(self, record: Json) -> None:
        """One line of metrics.jsonl, on disk when this returns."""
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Ends the writer's thread."""
        self._writer.close()
