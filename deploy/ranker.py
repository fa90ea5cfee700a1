"""Scores batches of packed requests, each request a success or a fault of its own.

The same file runs in `export`, where it is checked against the trained network, and, copied into a bundle, inside the
model server, so it imports nothing of ours; the bundle's transform and program come as arguments.
"""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
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


Result = Scored | ValueError
_NEARLY_LOWEST = -1.79e308


class Encoder:
    """The transform of some raw columns, and what packed rows of these columns have to be.

    `module` is the bundle's transform.py; `prefix` begins the names of the two inputs in what a fault says.
    """

    def __init__(self, transform: Any, *, module: Any, prefix: str = "") -> None:
        signature = transform.signature
        self.transform, self._module = transform, module
        self._columns = {
            f"{prefix}keys": signature.packed_names(signature.keys),
            f"{prefix}numbers": signature.packed_names(signature.numbers),
        }
        places = signature.places(signature.keys)
        self._lists = {name: place for name, place in places.items() if name in signature.slots}
        self._single = np.array([place.start for name, place in places.items() if name not in signature.slots], int)
        self._single_names = [name for name in signature.keys if name not in signature.slots]

    @property
    def widths(self) -> tuple[int, int]:
        """Columns of keys and of numbers."""
        keys, numbers = (len(names) for names in self._columns.values())
        return keys, numbers

    def blank(self, rows: int) -> Request:
        """A sound request of zeros."""
        keys, numbers = self.widths
        return Request(np.zeros((rows, keys), np.int64), np.zeros((rows, numbers)))

    def together(self, requests: Sequence[Request]) -> Any:
        """The rows of all requests as the transform takes them."""
        blank = self.blank(0)
        keys = np.concatenate([blank.keys, *(request.keys for request in requests)])
        numbers = np.concatenate([blank.numbers, *(request.numbers for request in requests)])
        if (low := numbers <= _NEARLY_LOWEST).any():  # JSON parsers round, or refuse, the lowest number itself
            numbers[low & np.isfinite(numbers)] = self._module.MISSING_NUMBER
        return self._module.Packed(keys, numbers)

    def missing_input(self, given: Collection[str]) -> ValueError | None:
        """An input that has columns and was not given."""
        for name, columns in self._columns.items():
            if columns and name not in given:
                return ValueError(f"input '{name}' is missing, with the columns {', '.join(dict.fromkeys(columns))}")
        return None

    def form_fault(self, request: Request) -> ValueError | None:
        """What is wrong with the types and shapes of one request."""
        parts = zip((request.keys, request.numbers), self._columns.items(), (np.int64, np.float64), strict=True)
        for array, (name, columns), kind in parts:
            if array.dtype != kind or array.ndim != 2 or array.shape[1] != len(columns):
                got, wanted = f"{array.dtype} {list(array.shape)}", f"{np.dtype(kind)} [B, {len(columns)}]"
                return ValueError(
                    f"input '{name}' is {got}, wanted {wanted} with the columns {', '.join(dict.fromkeys(columns))}"
                )
        keys, numbers = self._columns
        if not len(request.keys):
            return ValueError(f"inputs '{keys}' and '{numbers}' have no rows")
        if len(request.keys) != len(request.numbers):
            return ValueError(
                f"input '{keys}' has {len(request.keys)} rows, and input '{numbers}' {len(request.numbers)}"
            )
        return None

    def checked(self, requests: Sequence[Request]) -> tuple[list[ValueError | None], Any]:
        """What is wrong with the values of each request, and the rows of the others as the transform takes them.

        All are checked at once, and alone where that fails.
        """
        packed = self.together(requests)
        try:
            self._check(packed)
        except ValueError as error:
            faults: list[ValueError | None] = [error]
            if len(requests) > 1:
                faults = [self.checked([request])[0][0] for request in requests]
            sound = [request for request, fault in zip(requests, faults, strict=True) if fault is None]
            return faults, self.together(sound)
        return [None] * len(requests), packed

    def _check(self, packed: Any) -> None:
        self.transform.check(packed)
        none = packed.keys == self._module.NO_KEY
        if not none.any():
            return
        if (odd := none[:, self._single]).any():
            row, at = np.argwhere(odd)[0]
            got = f"column '{self._single_names[at]}' holds {self._module.NO_KEY} at row {row}, which fills up lists"
            raise ValueError(f"{got}: send {self._module.MISSING_KEY} for missing")
        for name, place in self._lists.items():
            gap = none[:, place][:, :-1] & ~none[:, place][:, 1:]
            if gap.any():
                row = int(np.argwhere(gap)[0][0])
                raise ValueError(f"column '{name}' has a value behind an unused place at row {row}: values come first")

    def encode(self, packed: Any) -> Any:
        """Ids and floats of rows that passed the checks."""
        with np.errstate(over="ignore"):  # what float32 can't hold becomes infinite, and a fault of its request
            return self.transform.apply(packed)


class Ranker:
    """One bundle's transform and program. `transform` is the bundle's own transform.py as a module, `program` what
    `load_program` of its served_program.py returns. `seen` is told of every transform, packed and encoded batch.
    """

    def __init__(
        self,
        folder: Path,
        transform: Any,
        *,
        program: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        seen: Callable[..., None] | None = None,
    ) -> None:
        schema = json.loads((folder / "schema.json").read_text(encoding="utf-8"))
        rows = {table["name"]: table["rows"] for table in schema["tables"]}
        slots = [feature for feature in schema["features"] for _ in range(feature["slots"])]
        self._slot_names = [feature["name"] for feature in slots]
        self._rows_S = np.array([rows[feature["table"]] for feature in slots], np.int64)
        self._lowest_S = np.array([-1 if feature["dtype"] == "list<int64>" else 0 for feature in slots], np.int64)
        weighted = [feature for feature in schema["features"] if feature["weighted"]]
        self.features, self.dense = schema["features"], schema["dense"]
        self._float_names = [dense["name"] for dense in schema["dense"]]
        self._float_names += [f"{feature['name']}:value" for feature in weighted for _ in range(feature["slots"])]
        self.module = transform
        self.encoder = Encoder(transform.Transform.mapped(folder / "transform"), module=transform)
        self._program = program
        self.seen = seen or _ignore

    def score(self, requests: Sequence[Request]) -> list[Result]:
        """One forward over all rows of the requests that are sound; a ValueError, in its place, for each other."""
        results: list[Result | None] = [self.encoder.form_fault(request) for request in requests]
        sound = [at for at, fault in enumerate(results) if fault is None]
        faults, packed = self.encoder.checked([requests[at] for at in sound])
        for at, fault in zip(sound, faults, strict=True):
            results[at] = fault
        sound = [at for at in sound if results[at] is None]
        encoded = self.encoder.encode(packed)
        self.seen(self.encoder.transform, packed=packed, encoded=encoded)
        counts = [len(requests[at].keys) for at in sound]
        scored = self.score_encoded(encoded.ids, encoded.floats, counts=counts, most=max(1, sum(counts)))
        for at, result in zip(sound, scored, strict=True):
            results[at] = result
        return [result for result in results if result is not None]

    def score_encoded(self, ids_BS: Int64s, floats_BN: Float32s, *, counts: Sequence[int], most: int) -> list[Result]:
        """Scores the rows of requests with `counts` rows each, at most `most` rows in one forward."""
        pieces = _pieces(counts)
        results: list[Result | None] = [None] * len(counts)
        if self._encoded_fault(ids_BS, floats_BN) is not None:
            results = [self._encoded_fault(ids_BS[piece], floats_BN[piece]) for piece in pieces]
            kept = [np.arange(0), *(np.arange(p.start, p.stop) for p, r in zip(pieces, results, strict=True) if not r)]
            ids_BS, floats_BN = ids_BS[np.concatenate(kept)], floats_BN[np.concatenate(kept)]
        sound = [at for at, fault in enumerate(results) if fault is None]
        if sound:
            score_BT = self.forward(ids_BS, floats_BN, most=most)
            finite = bool(np.isfinite(score_BT).all())
            for at, piece in zip(sound, _pieces([counts[at] for at in sound]), strict=True):
                scored = Scored(score_BT[piece], ids_BS[piece], floats_BN[piece])
                results[at] = scored if finite else _finite(scored)
        return [result for result in results if result is not None]

    def forward(self, ids_BS: Int64s, floats_BN: Float32s, *, most: int) -> Float32s:
        """Probabilities [B, T] of encoded rows."""
        ids, floats = (torch.from_numpy(np.ascontiguousarray(array)) for array in (ids_BS, floats_BN))
        with torch.inference_mode():
            parts = [self._program(ids[at : at + most], floats[at : at + most]) for at in range(0, len(ids), most)]
            score_BT: Float32s = (parts[0] if len(parts) == 1 else torch.cat(parts)).numpy()
        return score_BT

    def blank(self, rows: int) -> Request:
        """A sound request of zeros, for warm-up."""
        return self.encoder.blank(rows)

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


def _ignore(transform: Any, *, packed: Any, encoded: Any, skip: frozenset[str] = frozenset()) -> None:
    """What nobody wants to know."""


def _pieces(counts: Sequence[int]) -> list[slice]:
    return [slice(end - count, end) for end, count in zip(accumulate(counts), counts, strict=True)]


def _finite(scored: Scored) -> Result:
    if np.isfinite(scored.score).all():
        return scored
    row = int(np.argwhere(~np.isfinite(scored.score))[0][0])
    return ValueError(f"the score of row {row} is not finite: its numbers are too large for the network")
