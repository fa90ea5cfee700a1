"""Scores batches of packed requests, each request a success or a fault of its own.

The same file runs in `export`, where it is checked against the trained network, and, copied into a bundle, inside the
model server, so it imports nothing of ours; the bundle's transform and program come as arguments.
"""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import copy
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
    """Packed rows: keys int64 [B, C], numbers [B, M] as float64, or float32 with its own lowest one for missing."""

    keys: Int64s
    numbers: Float64s | Float32s


@dataclass(frozen=True)
class Scored:
    """score float32 [B, T], and what it was computed from: ids int64 [B, S], floats float32 [B, N]."""

    score: Float32s
    ids: Int64s
    floats: Float32s


Result = Scored | ValueError
_NEARLY_LOWEST, _NEARLY_LOWEST_FP32 = -1.79e308, -3.4e38


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
        numbers = np.concatenate([blank.numbers, *(self._doubles(request.numbers) for request in requests)])
        if (low := numbers <= _NEARLY_LOWEST).any():  # JSON parsers round, or refuse, the lowest number itself
            numbers[low & np.isfinite(numbers)] = self._module.MISSING_NUMBER
        return self._module.Packed(keys, numbers)

    def _doubles(self, numbers: Float64s | Float32s) -> Float64s:
        doubles: Float64s = numbers.astype(np.float64, copy=False)
        if numbers.dtype == np.float64:
            return doubles
        return np.where((numbers <= _NEARLY_LOWEST_FP32) & np.isfinite(numbers), self._module.MISSING_NUMBER, doubles)

    def missing_input(self, given: Collection[str]) -> ValueError | None:
        """An input that has columns and was not given."""
        for name, columns in self._columns.items():
            if columns and name not in given:
                return ValueError(f"input '{name}' is missing, with the columns {', '.join(dict.fromkeys(columns))}")
        return None

    def form_fault(self, request: Request) -> ValueError | None:
        """What is wrong with the types and shapes of one request."""
        kinds = ((np.int64,), (np.float64, np.float32))
        parts = zip((request.keys, request.numbers), self._columns.items(), kinds, strict=True)
        for array, (name, columns), kind in parts:
            if array.dtype not in kind or array.ndim != 2 or array.shape[1] != len(columns):
                got, wanted = f"{array.dtype} {list(array.shape)}", f"{np.dtype(kind[0])} [B, {len(columns)}]"
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


class Bounds:
    """What encoded rows of some columns have to be: ids within their tables, floats within float32."""

    def __init__(self, features: Sequence[Any], *, dense: Sequence[Any], rows: Mapping[str, int]) -> None:
        slots = [feature for feature in features for _ in range(feature["slots"])]
        self.slot_names = np.array([feature["name"] for feature in slots], object)
        self.rows_S = np.array([rows[feature["table"]] for feature in slots], np.int64)
        self.lowest_S = np.array([-1 if feature["dtype"] == "list<int64>" else 0 for feature in slots], np.int64)
        values = [f"{feature['name']}:value" for feature in slots if feature["weighted"]]
        self.float_names = np.array([*(step["name"] for step in dense), *values], object)

    def of(self, ids: Int64s, floats: Int64s) -> "Bounds":
        """Those of some columns alone."""
        part = copy(self)
        part.slot_names, part.rows_S, part.lowest_S = self.slot_names[ids], self.rows_S[ids], self.lowest_S[ids]
        part.float_names = self.float_names[floats]
        return part

    def faults(self, ids_BS: Int64s, floats_BN: Float32s, *, counts: Sequence[int]) -> list[ValueError | None]:
        """What is wrong with the rows of each request, of `counts` rows; each is looked at where all are not sound."""
        if self._fault(ids_BS, floats_BN) is None:
            return [None] * len(counts)
        return [self._fault(ids_BS[piece], floats_BN[piece]) for piece in pieces(counts)]

    def _fault(self, ids_BS: Int64s, floats_BN: Float32s) -> ValueError | None:
        """An id outside of its table would read the row of a neighbour in the merged matrix, so none gets there."""
        if (outside := out_of_range(ids_BS, self.rows_S, lowest_S=self.lowest_S)) is not None:
            row, at = outside
            table = f"its table has {self.rows_S[at]} rows"
            return ValueError(f"feature '{self.slot_names[at]}' has id {ids_BS[row, at]} at row {row}, {table}")
        finite = np.isfinite(floats_BN)
        if not finite.all():
            row, at = np.argwhere(~finite)[0]
            return ValueError(f"feature '{self.float_names[at]}' leaves the range of float32 at row {row}")
        return None


class Ranker:
    """One bundle's transform and program. `transform` is the bundle's own transform.py as a module, `program` what
    `load_program` of its served_program.py returns. `seen` is told of every transform, packed and encoded batch.
    """

    def __init__(self, folder: Path, transform: Any, *, program: Any, seen: Callable[..., None] | None = None) -> None:
        schema = json.loads((folder / "schema.json").read_text(encoding="utf-8"))
        rows = {table["name"]: table["rows"] for table in schema["tables"]}
        self.features, self.dense = schema["features"], schema["dense"]
        self.bounds = Bounds(self.features, dense=self.dense, rows=rows)
        self.module = transform
        self.encoder = Encoder(transform.Transform.mapped(folder / "transform"), module=transform)
        self.program = program
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
        for at, result in zip(sound, self._score_encoded(encoded, counts), strict=True):
            results[at] = result
        return [result for result in results if result is not None]

    def _score_encoded(self, encoded: Any, counts: Sequence[int]) -> list[Result]:
        results: list[Result | None] = [*self.bounds.faults(encoded.ids, encoded.floats, counts=counts)]
        sound = [at for at, fault in enumerate(results) if fault is None]
        if sound:
            rows = rows_of(sound, counts)
            ids_BS, floats_BN = encoded.ids[rows], encoded.floats[rows]
            score_BT = forward(self.program, [(ids_BS, floats_BN)])
            finite = bool(np.isfinite(score_BT).all())
            for at, piece in zip(sound, pieces([counts[at] for at in sound]), strict=True):
                fault = None if finite else score_fault(score_BT[piece])
                results[at] = fault or Scored(score_BT[piece], ids_BS[piece], floats_BN[piece])
        return [result for result in results if result is not None]

    def blank(self, rows: int) -> Request:
        """A sound request of zeros, for warm-up."""
        return self.encoder.blank(rows)


def out_of_range(ids_BS: Int64s, rows_S: Int64s, *, lowest_S: Int64s) -> tuple[int, int] | None:
    """The first (row, slot) whose id is below the lowest allowed or not below the rows of its table."""
    outside = (ids_BS < lowest_S) | (ids_BS >= rows_S)
    if not outside.any():
        return None
    row, at = np.argwhere(outside)[0]
    return int(row), int(at)


def _ignore(transform: Any, *, packed: Any, encoded: Any, skip: frozenset[str] = frozenset()) -> None:
    """What nobody wants to know."""


def pieces(counts: Sequence[int]) -> list[slice]:
    """The rows of each request, of `counts` rows."""
    return [slice(end - count, end) for end, count in zip(accumulate(counts), counts, strict=True)]


def rows_of(kept: Sequence[int], counts: Sequence[int]) -> slice | Int64s:
    """The rows of the requests that are kept, without a copy where all are."""
    if len(kept) == len(counts):
        return slice(None)
    places = pieces(counts)
    return np.concatenate([np.arange(places[at].start, places[at].stop) for at in kept])


def forward(program: Callable[..., torch.Tensor], batches: Iterable[Sequence[npt.NDArray[Any]]]) -> Float32s:
    """Probabilities [B, T] of the rows of all batches, each the inputs of a program."""
    with torch.inference_mode():
        parts = [program(*(torch.from_numpy(np.ascontiguousarray(each)) for each in batch)) for batch in batches]
        score_BT: Float32s = (parts[0] if len(parts) == 1 else torch.cat(parts)).numpy()
    return score_BT


def score_fault(score_BT: Float32s) -> ValueError | None:
    """Names the first row whose score is no number."""
    finite = np.isfinite(score_BT)
    if finite.all():
        return None
    row = int(np.argwhere(~finite)[0][0])
    return ValueError(f"the score of row {row} is not finite: its numbers are too large for the network")
