"""Scores batches of packed requests, each request a success or a fault of its own.

The same file runs in `export`, where it is checked against the trained network, and, copied into a bundle, inside the
model server, so it imports nothing of ours; the bundle's transform comes as an argument.
"""

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

Int64s = npt.NDArray[np.int64]
Float64s = npt.NDArray[np.float64]
Float32s = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Request:
    """Packed rows: keys int64 [B, C], numbers float64 [B, M]."""

    keys: Int64s
    numbers: Float64s


@dataclass(frozen=True)
class Scored:
    """score float32 [B, T], and what it was computed from: ids int64 [B, F], dense float32 [B, N]."""

    score: Float32s
    ids: Int64s
    dense: Float32s


class Ranker:
    """One bundle's transform, program and weights. `transform` is the bundle's own transform.py as a module."""

    def __init__(self, folder: Path, transform: Any) -> None:
        schema = json.loads((folder / "schema.json").read_text(encoding="utf-8"))
        rows = {table["name"]: table["rows"] for table in schema["tables"]}
        self._feature_names = [feature["name"] for feature in schema["features"]]
        self._feature_rows = np.array([rows[feature["table"]] for feature in schema["features"]], np.int64)
        self._dense_names = [dense["name"] for dense in schema["dense"]]
        self._module = transform
        self._transform = transform.Transform.load(folder / "transform")
        self._number_names: Sequence[str] = self._transform.packer.numbers
        self._key_names: Sequence[str] = self._transform.packer.keys
        self._forward = load_program(folder)

    def score(self, requests: Sequence[Request]) -> list[Scored | ValueError]:
        """One forward over all rows of the requests that are sound; a ValueError, in its place, for each other."""
        results: list[Scored | ValueError | None] = [self._request_fault(request) for request in requests]
        sound = [at for at, fault in enumerate(results) if fault is None]
        ids_BF, dense_BN = self._encode([requests[at] for at in sound])
        counts = [len(requests[at].keys) for at in sound]
        pieces = dict(zip(sound, _pieces(counts), strict=True))
        for at, piece in pieces.items():
            results[at] = self._encoded_fault(ids_BF[piece], dense_BN[piece])
        sound = [at for at in sound if results[at] is None]
        if sound:
            kept = np.concatenate([np.arange(pieces[at].start, pieces[at].stop) for at in sound])
            ids_BF, dense_BN = ids_BF[kept], dense_BN[kept]
            score_BT = self.forward(ids_BF, dense_BN)
            for at, piece in zip(sound, _pieces([len(requests[at].keys) for at in sound]), strict=True):
                results[at] = _finite(Scored(score_BT[piece], ids_BF[piece], dense_BN[piece]))
        return [result for result in results if result is not None]

    def forward(self, ids_BF: Int64s, dense_BN: Float32s) -> Float32s:
        """Probabilities [B, T] of encoded rows."""
        with torch.inference_mode():
            score_BT: Float32s = self._forward(torch.from_numpy(ids_BF), torch.from_numpy(dense_BN)).numpy()
        return score_BT

    def blank(self, rows: int) -> Request:
        """A sound request of zeros, for warm-up."""
        keys = np.zeros((rows, len(self._key_names)), np.int64)
        return Request(keys, np.zeros((rows, len(self._number_names)), np.float64))

    def _encode(self, requests: Sequence[Request]) -> tuple[Int64s, Float32s]:
        blank = self.blank(0)
        keys = np.concatenate([blank.keys, *(request.keys for request in requests)])
        numbers = np.concatenate([blank.numbers, *(request.numbers for request in requests)])
        with np.errstate(over="ignore"):  # what float32 can't hold becomes infinite, and a fault of its request
            encoded = self._transform.apply(self._module.Packed(keys, numbers))
        return encoded.ids, encoded.dense

    def _request_fault(self, request: Request) -> ValueError | None:
        wanted = (len(self._key_names), len(self._number_names))
        got = (request.keys.shape[-1], request.numbers.shape[-1])
        if got != wanted or len(request.keys) != len(request.numbers):
            shapes = f"{list(request.keys.shape)} and {list(request.numbers.shape)}"
            return ValueError(
                f"keys and numbers have the shapes {shapes}, wanted [B, {wanted[0]}] and [B, {wanted[1]}]"
            )
        try:
            self._module.check_numbers(request.numbers, self._number_names)
        except ValueError as fault:
            return fault
        return None

    def _encoded_fault(self, ids_BF: Int64s, dense_BN: Float32s) -> ValueError | None:
        """An id outside of its table would read the row of a neighbour in the merged matrix, so none gets there."""
        if (outside := out_of_range(ids_BF, self._feature_rows)) is not None:
            row, at = outside
            table = f"its table has {self._feature_rows[at]} rows"
            return ValueError(f"feature '{self._feature_names[at]}' has id {ids_BF[row, at]} at row {row}, {table}")
        finite = np.isfinite(dense_BN)
        if not finite.all():
            row, at = np.argwhere(~finite)[0]
            return ValueError(f"dense feature '{self._dense_names[at]}' leaves the range of float32 at row {row}")
        return None


def out_of_range(ids_BF: Int64s, rows_F: Int64s) -> tuple[int, int] | None:
    """The first (row, feature) whose id is below 0 or not below the rows of its table."""
    outside = (ids_BF < 0) | (ids_BF >= rows_F)
    if not outside.any():
        return None
    row, at = np.argwhere(outside)[0]
    return int(row), int(at)


def load_weights(path: Path) -> Mapping[str, torch.Tensor]:
    """Tensors that lie in the mapped file: all processes that read it share one copy in the page cache."""
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}


def load_program(folder: Path) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The program with its weights bound: (ids [B, F], dense [B, N]) -> probabilities [B, T].

    The graph is called as it is: the wrapper that torch.export puts around it costs five times the small network.
    """
    weights = load_weights(folder / "weights.safetensors").values()
    _refuse_pickles(folder / "program.pt2")
    graph = torch.export.load(folder / "program.pt2").graph_module

    def forward(ids_BF: torch.Tensor, dense_BN: torch.Tensor) -> torch.Tensor:
        (score_BT,) = graph(*weights, ids_BF, dense_BN)
        return torch.as_tensor(score_BT)

    return forward


def _refuse_pickles(program: Path) -> None:
    """torch.export.load unpickles weights and constants that an archive holds; ours holds code alone."""
    with zipfile.ZipFile(program) as archive:
        data = [entry for entry in archive.infolist() if "/data/" in entry.filename and entry.file_size]
    if foreign := [entry.filename for entry in data if not entry.filename.endswith("_config.json")]:
        raise ValueError(f"{program} holds {', '.join(foreign)}, wanted code alone")


def _pieces(counts: Sequence[int]) -> list[slice]:
    ends = np.cumsum(counts).tolist()
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


def _finite(scored: Scored) -> Scored | ValueError:
    if np.isfinite(scored.score).all():
        return scored
    row = int(np.argwhere(~np.isfinite(scored.score))[0][0])
    return ValueError(f"the score of row {row} is not finite: its numbers are too large for the network")
