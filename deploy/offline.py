"""Offline scores: the trained network itself on raw rows, what every served score is compared with."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import nn

from etl.transform import Transform

_ROWS = 4096


@dataclass(frozen=True)
class Scores:
    """ids int64 [B, F], dense float32 [B, N], score float32 [B, T]."""

    ids: npt.NDArray[np.int64]
    dense: npt.NDArray[np.float32]
    score: npt.NDArray[np.float32]


def offline_scores(network: nn.Module, transform: Transform, *, table: pa.Table) -> Scores:
    """Packs, transforms and scores raw rows in this process."""
    encoded = transform.apply(transform.pack(table))
    ids_BF, dense_BN = torch.from_numpy(encoded.ids), torch.from_numpy(encoded.dense)
    with torch.no_grad():
        parts = [network(ids_BF[at : at + _ROWS], dense_BN[at : at + _ROWS]) for at in range(0, len(ids_BF), _ROWS)]
        score_BT = torch.cat(parts).sigmoid().numpy()
    return Scores(encoded.ids, encoded.dense, score_BT)


def offline_run(run: Path) -> tuple[nn.Module, Transform]:
    """The trained network of a run folder and the transform of the rows it learned from."""
    from recsys.predict import load_network

    _, _, network = load_network(run)
    return network, Transform.load(run / "transform")
