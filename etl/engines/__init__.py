"""The engines. Each fits a feature spec on typed training rows and encodes typed rows; all make the same folder."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from etl.artifact import Json
from etl.engines.device import Device, check_device, queries_on
from etl.engines.polars import fit
from etl.extend import Parent
from etl.pack import encode
from etl.schema import IdFeature, Table
from etl.spec import Etl, FeatureSpec
from etl.transform import Encoded, Transform
from etl.typed import Typed

Progress = Callable[[float], None]
Fitted = tuple[Json, list[IdFeature], list[Table]]
Encode = Callable[[pa.Table, int], Encoded]
"""Raw rows of a split that follow one another, and the number of the first of them, from 0."""


class Engine(Protocol):
    """What the job needs of an engine."""

    def fit(
        self, spec: FeatureSpec, train: Typed, *, transform: Path, parent: Parent | None, progress: Progress
    ) -> Fitted:
        """Fits on the training rows and writes the vocabularies; returns the rest of the state, and the tables.

        `progress` hears of the share that is done.

        Raises:
            Fault: a feature that can't be fitted on these rows, or that this engine does not know.
        """

    def encoder(self, split: str, rows: Typed, *, transform: Transform) -> Encode:
        """What encodes the rows of a split, in any order of its batches and from several threads."""


@contextlib.contextmanager
def open_engine(etl: Etl, *, beside: Path) -> Iterator[Engine]:
    """The engine that the experiment names. What it writes for itself lies beside that folder until the block ends.

    Raises:
        Fault: the engine is not installed, or what it shall run on is not there.
    """
    if etl.engine == "polars":
        check_device(etl.device)
        yield _Polars(etl.device)
        return
    from etl.engines.nvtabular.engine import open_nvtabular  # may not be installed

    with open_nvtabular(etl, beside=beside) as engine:
        yield engine


class _Polars:
    """Fits with polars and encodes with the served transform itself."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def fit(
        self, spec: FeatureSpec, train: Typed, *, transform: Path, parent: Parent | None, progress: Progress
    ) -> Fitted:
        columns, device = train.columns, self._device
        with queries_on(device):
            return fit(spec, columns, transform=transform, parent=parent, device=device, progress=progress)

    def encoder(self, split: str, rows: Typed, *, transform: Transform) -> Encode:
        return lambda raw, first: encode(
            raw, transform, place=place_of(split, first=first, rows=raw.num_rows), checked=True
        )


def place_of(split: str, *, first: int, rows: int) -> str:
    """How a fault names rows of a split."""
    return f"{split} rows {first + 1} to {first + rows}"
