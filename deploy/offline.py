"""Offline scores: the trained network itself on raw rows, what every served score is compared with."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from etl.pack import encode
from etl.transform import Transform

if TYPE_CHECKING:
    from recsys.network import Network


@dataclass(frozen=True)
class Scores:
    """ids int64 [B, S], score float32 [B, T]."""

    ids: npt.NDArray[np.int64]
    score: npt.NDArray[np.float32]


def offline_scores(network: "Network", transform: Transform, *, table: pa.Table) -> Scores:
    """Packs, transforms and scores raw rows in this process. Raises Fault where a value can't be packed."""
    from recsys.predict import probabilities

    encoded = encode(table, transform, place="the rows to score offline")
    return Scores(encoded.ids, probabilities(network, encoded))


def offline_run(run: Path) -> tuple["Network", Transform]:
    """The trained network of a run folder and the transform of the rows it learned from."""
    from recsys.predict import load_network

    _, _, network = load_network(run)
    return network, Transform.load(run / "transform")
