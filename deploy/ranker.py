"""Scores batches of packed requests, each request a success or a fault of its own.

The same file runs in `export`, where it is checked against the trained network, and, copied into a bundle, inside the
model server, so it imports nothing of ours; the bundle's transform and program come as arguments.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

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
    """score float32 [B, T], and what it was computed from: ids int64 [B, S], floats float32 [B, N]."""

    score: Float32s
    ids: Int64s
    floats: Float32s


class Ranker:
    """One bundle's transform and program. `transform` is the bundle's own transform.py as a module, `program` what
    `load_program` of its served_program.py returns.
    """

    def __init__(
        self, folder: Path, transform: Any, *, program: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> None:
        schema = json.loads((folder / "schema.json").read_text(encoding="utf-8"))
        rows = {table["name"]: table["rows"] for table in schema["tables"]}
        slots = [feature for feature in schema["features"] for _ in range(feature["slots"])]
        self._slot_names = [feature["name"] for feature in slots]
        self._rows_S = np.array([rows[feature["table"]] for feature in slots], np.int64)
        self._lowest_S = np.array([-1 if feature["dtype"] == "list<int64>" else 0 for feature in slots], np.int64)
        weighted = [feature for feature in schema["features"] if feature["weighted"]]
        self._float_names = [dense["name"] for dense in schema["dense"]]
        self._float_names += [f"{feature['name']}:value" for feature in weighted for _ in range(feature["slots"])]
        self._module = transform
        self._transform = transform.Transform.load(folder / "transform")
        signature = self._transform.signature
        self._keys = len(signature.packed_names(signature.keys))
        self._numbers = len(signature.packed_names(signature.numbers))
        self._forward = program

    def score(self, requests: Sequence[Request]) -> list[Scored | ValueError]:
        """One forward over all rows of the requests that are sound; a ValueError, in its place, for each other."""
        results: list[Scored | ValueError | None] = [self._request_fault(request) for request in requests]
        sound = [at for at, fault in enumerate(results) if fault is None]
        ids_BS, floats_BN = self._encode([requests[at] for at in sound])
        counts = [len(requests[at].keys) for at in sound]
        pieces = dict(zip(sound, _pieces(counts), strict=True))
        for at, piece in pieces.items():
            results[at] = self._encoded_fault(ids_BS[piece], floats_BN[piece])
        sound = [at for at in sound if results[at] is None]
        if sound:
            kept = np.concatenate([np.arange(pieces[at].start, pieces[at].stop) for at in sound])
            ids_BS, floats_BN = ids_BS[kept], floats_BN[kept]
            score_BT = self.forward(ids_BS, floats_BN)
            for at, piece in zip(sound, _pieces([len(requests[at].keys) for at in sound]), strict=True):
                results[at] = _finite(Scored(score_BT[piece], ids_BS[piece], floats_BN[piece]))
        return [result for result in results if result is not None]

    def forward(self, ids_BS: Int64s, floats_BN: Float32s) -> Float32s:
        """Probabilities [B, T] of encoded rows."""
        with torch.inference_mode():
            score_BT: Float32s = self._forward(torch.from_numpy(ids_BS), torch.from_numpy(floats_BN)).numpy()
        return score_BT

    def blank(self, rows: int) -> Request:
        """A sound request of zeros, for warm-up."""
        keys = np.zeros((rows, self._keys), np.int64)
        return Request(keys, np.zeros((rows, self._numbers), np.float64))

    def _encode(self, requests: Sequence[Request]) -> tuple[Int64s, Float32s]:
        blank = self.blank(0)
        keys = np.concatenate([blank.keys, *(request.keys for request in requests)])
        numbers = np.concatenate([blank.numbers, *(request.numbers for request in requests)])
        with np.errstate(over="ignore"):  # what float32 can't hold becomes infinite, and a fault of its request
            encoded = self._transform.apply(self._module.Packed(keys, numbers))
        return encoded.ids, encoded.floats

    def _request_fault(self, request: Request) -> ValueError | None:
        wanted = (self._keys, self._numbers)
        got = (request.keys.shape[-1], request.numbers.shape[-1])
        if got != wanted or len(request.keys) != len(request.numbers):
            shapes = f"{list(request.keys.shape)} and {list(request.numbers.shape)}"
            return ValueError(
                f"keys and numbers have the shapes {shapes}, wanted [B, {wanted[0]}] and [B, {wanted[1]}]"
            )
        try:
            self._transform.check(self._module.Packed(request.keys, request.numbers))
        except ValueError as fault:
            return fault
        return None

    def _encoded_fault(self, ids_BS: Int64s, floats_BN: Float32s) -> ValueError | None:
        """An id outside of its table would read the row of a neighbour in the merged matrix, so none gets there."""
        if (outside := out_of_range(ids_BS, self._rows_S, lowest_S=self._lowest_S)) is not None:
            row, at = outside
            table = f"its table has {self._rows_S[at]} rows"
            return ValueError(f"feature '{self._slot_names[at]}' has id {ids_BS[row, at]} at row {row}, {table}")
        finite = np.isfinite(floats_BN)
        if not finite.all():
            row, at = np.argwhere(~finite)[0]
            return ValueError(f"feature '{self._float_names[at]}' leaves the range of float32 at row {row}")
        return None


def out_of_range(ids_BS: Int64s, rows_S: Int64s, *, lowest_S: Int64s) -> tuple[int, int] | None:
    """The first (row, slot) whose id is below the lowest allowed or not below the rows of its table."""
    outside = (ids_BS < lowest_S) | (ids_BS >= rows_S)
    if not outside.any():
        return None
    row, at = np.argwhere(outside)[0]
    return int(row), int(at)


def _pieces(counts: Sequence[int]) -> list[slice]:
    ends = np.cumsum(counts).tolist()
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


def _finite(scored: Scored) -> Scored | ValueError:
    if np.isfinite(scored.score).all():
        return scored
    row = int(np.argwhere(~np.isfinite(scored.score))[0][0])
    return ValueError(f"the score of row {row} is not finite: its numbers are too large for the network")
