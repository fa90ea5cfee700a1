"""The fitted transform: raw rows -> packed request -> ids and dense values.

The same file runs in the ETL, in offline scoring and, copied into a bundle, inside the model server, so it imports
nothing of ours but `lookup.py` beside it. Raw rows are packed without any fitted state (`etl/pack.py`, also at the
client): texts become 64-bit keys, whole numbers are their own keys, the lowest value of a type stands for missing, and
a list takes as many columns as it may have values, the unused ones last. `Transform` holds the fitted state and turns
packed rows into table rows (row 0 = missing or unseen, -1 = no value) and floats.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .lookup import MISSING_KEY as MISSING_KEY
from .lookup import NO_KEY as NO_KEY
from .lookup import RESERVED_KEYS as RESERVED_KEYS
from .lookup import Encoding, Vocabulary
from .lookup import Float64s as Float64s
from .lookup import Int64s as Int64s
from .lookup import mix as mix

Float32s = npt.NDArray[np.float32]

State = Mapping[str, Any]
"""A part of transform.json, or of the signature, as JSON values."""
Encodings = Mapping[str, Callable[[Int64s], Float64s]]

MISSING_NUMBER = float(np.finfo(np.float64).min)


@dataclass(frozen=True)
class Packed:
    """Raw rows as they travel: keys int64 [B, C], numbers float64 [B, M]."""

    keys: Int64s
    numbers: Float64s


@dataclass(frozen=True)
class Encoded:
    """What the network reads: ids int64 [B, S], floats float32 [B, N], in the order of the schema.

    By feature [F]: `missing` counts absent values, `unseen` values that were there but have no row of their own.
    """

    ids: Int64s
    floats: Float32s
    missing: Int64s
    unseen: Int64s


def not_reserved(keys: Int64s) -> Int64s:
    """Hashes that happen to be a key with a meaning are moved beside."""
    return np.where(np.isin(keys, RESERVED_KEYS), NO_KEY + 1, keys)


def hashed_rows(keys: Int64s, *, rows: int | Int64s) -> Int64s:
    """Rows 1 to rows - 1 by hash; a missing key is row 0. Several sizes [H, 1] are those of keys [H, B]."""
    return np.where(keys == MISSING_KEY, 0, (mix(keys) % np.asarray(rows - 1).astype(np.uint64)).view(np.int64) + 1)


@dataclass(frozen=True)
class Signature:
    """What a client has to know to pack a request.

    `columns` maps each raw column to "string", "int64", "float64" or a list<> of these; `keys` and `numbers` name the
    columns of the two packed matrices. `slots` holds the longest list of each list column, `newest` the list columns
    that lose their oldest values where they are longer; another list that is too long is a fault.
    """

    columns: Mapping[str, str]
    keys: tuple[str, ...]
    numbers: tuple[str, ...]
    slots: Mapping[str, int]
    newest: tuple[str, ...]

    @classmethod
    def from_json(cls, signature: State) -> "Signature":
        """From `as_json()`, after a trip through JSON."""
        keys, numbers, newest = (tuple(signature[name]) for name in ("keys", "numbers", "newest"))
        return cls(dict(signature["columns"]), keys, numbers, dict(signature["slots"]), newest)

    def as_json(self) -> State:
        """As JSON values."""
        lists = {"keys": list(self.keys), "numbers": list(self.numbers), "newest": list(self.newest)}
        return {"columns": dict(self.columns), "slots": dict(self.slots), **lists}

    def places(self, names: Sequence[str]) -> dict[str, slice]:
        """Where each column of `keys` or of `numbers` stands in the packed matrix."""
        ends = np.cumsum([self.slots.get(name, 1) for name in names]).tolist()
        return {name: slice(end - self.slots.get(name, 1), end) for name, end in zip(names, ends, strict=True)}

    def packed_names(self, names: Sequence[str]) -> list[str]:
        """The raw column behind each column of the packed matrix."""
        return [name for name in names for _ in range(self.slots.get(name, 1))]


def check_numbers(numbers: Float64s, names: Sequence[str]) -> None:
    """Raises ValueError naming the first column of [B, M] that holds NaN or infinity."""
    finite = np.isfinite(numbers)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise ValueError(f"column '{names[column]}' holds {numbers[row, column]} at row {row}: send null for missing")


class Transform:
    """The fitted state of a dataset folder's `transform/`."""

    def __init__(self, state: State, tables: Mapping[str, Vocabulary], *, encodings: Encodings | None = None) -> None:
        self.signature = Signature.from_json(state["signature"])
        self.features: list[State] = state["features"]
        self.dense: list[State] = state["dense"]
        self.vocabularies, self.encodings = tables, encodings or {}
        self._key_places = self.signature.places(self.signature.keys)
        self._number_places = self.signature.places(self.signature.numbers)
        scaled = [step for step in (*self.dense, *self.features) if "mean" in step]
        self._scaled = np.array([self._number_places[step["column"]].start for step in scaled], np.int64)
        self._scaling = as_columns(scaled)

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        vocabulary: Callable[[Path], Vocabulary] = Vocabulary.read,
        encoding: Callable[[Path, float], Encoding] = Encoding.read,
    ) -> "Transform":
        """Reads `transform.json`, and the vocabularies and encodings it names."""
        state = json.loads((folder / "transform.json").read_text(encoding="utf-8"))
        tables = {step["table"] for step in state["features"] if step["kind"] == "vocabulary"}
        vocabularies = {t: vocabulary(folder / "vocabulary" / f"{t}.parquet") for t in sorted(tables)}
        others = {step["name"]: step["other"] for step in state["dense"] if "by" in step}
        encodings = {n: encoding(folder / "encoding" / f"{n}.parquet", other) for n, other in others.items()}
        return cls(state, vocabularies, encodings=encodings)

    @classmethod
    def mapped(cls, folder: Path) -> "Transform":
        """A bundle's, with the hash tables that `write_slots` left there; raises ValueError where one is not whole."""
        return cls.load(folder, vocabulary=Vocabulary.mapped, encoding=Encoding.mapped)

    def apply(self, packed: Packed) -> Encoded:
        """Packed rows [B, ...] that passed `check` to ids [B, S] and floats [B, N]; never fails."""
        keys = list(self._keys(packed).values())
        starts = [0, *accumulate(key.shape[1] for key in keys)]
        ids_SB = np.empty((starts[-1], len(packed.keys)), np.int64)
        missing, zeros = counts = np.zeros((2, len(keys)), np.int64)
        for part in cached(len(keys), rows=len(packed.keys)):
            key_SB, own = _stacked(keys[part]), ids_SB[starts[part.start] : starts[part.stop]]
            ends = [end - starts[part.start] for end in starts[part.start : part.stop + 1]]
            places = [slice(*pair) for pair in pairwise(ends)]
            counts[:, part] = self.look_up(self.features[part], key_SB, places=places, ids_SB=own)
        return Encoded(ids_SB.T, self._floats(packed).T, missing, zeros - missing)

    def _keys(self, packed: Packed) -> dict[str, Int64s]:
        """The values [B, slots] of each id feature before its table is looked up."""
        keys: dict[str, Int64s] = {}
        for step in self.features:
            if (kind := step["kind"]) == "cross":
                keys[step["name"]] = crossed([keys[name] for name in step["inputs"]])
            elif kind == "buckets":
                numbers = packed.numbers[:, self._number_places[step["column"]]]
                keys[step["name"]] = bucket_keys(numbers, step["boundaries"])
            elif kind == "field":
                keys[step["name"]] = np.ones((len(packed.keys), 1), np.int64)
            else:
                keys[step["name"]] = packed.keys[:, self._key_places[step["column"]]]
        return keys

    def look_up(
        self, steps: Sequence[State], key_SB: Int64s, *, places: Sequence[slice], ids_SB: Int64s
    ) -> Sequence[Sequence[int]]:
        """Rows of the tables of some features, whose slots lie at these places; counts [2, F] missing keys and rows 0.

        The ETL has faster ways to the same ids and, in `scale`, to the same floats.
        """
        hashed: list[tuple[int, int]] = []  # slot, rows of its table
        for step, place in zip(steps, places, strict=True):
            if step["kind"] == "vocabulary":
                ids_SB[place] = self.vocabularies[step["table"]](key_SB[place])
            elif step["kind"] == "buckets":
                ids_SB[place] = np.where(key_SB[place] == MISSING_KEY, 0, key_SB[place] + 1)
            elif step["kind"] == "field":
                ids_SB[place] = key_SB[place]
            else:
                hashed += [(at, step["rows"]) for at in range(place.start, place.stop)]
        if hashed:
            at, rows = np.array(hashed, np.int64).T
            ids_SB[at] = hashed_rows(key_SB[at], rows=rows[:, None])
        if (nothing := key_SB == NO_KEY).any():
            ids_SB[nothing] = -1
        return [[np.count_nonzero(of[at]) for at in places] for of in (key_SB == MISSING_KEY, ids_SB == 0)]

    def _floats(self, packed: Packed) -> Float32s:
        """[N, B]: dense inputs, then what multiplies the rows of fields and of bags with weights."""
        scaled = np.empty((len(self._scaled), len(packed.keys)), np.float32)
        for part in cached(len(scaled), rows=len(packed.keys)):
            scaling, of = {name: column[part] for name, column in self._scaling.items()}, self._scaled[part]
            numbers_NB = packed.numbers.T[of if len(of) > 1 else slice(of[0], of[0] + 1)]  # a single one as it lies
            self.scale(numbers_NB, scaling, into=scaled[part])
        of_scaled, parts = iter(scaled[:, None]), [scaled[:0]]
        for step in (*self.dense, *self.features):
            if "mean" in step:
                parts.append(next(of_scaled))
            elif "by" in step:
                keys = crossed([packed.keys[:, self._key_places[name]] for name in step["by"]])
                parts.append(self.encodings[step["name"]](keys).T.astype(np.float32))
            elif step.get("weights"):
                weights = packed.numbers[:, self._number_places[step["weights"]]].T
                parts.append(np.where(weights == MISSING_NUMBER, 0.0, weights).astype(np.float32))
        return np.concatenate(parts) if len(parts) > len(scaled) + 1 else scaled

    def scale(self, numbers_NB: Float64s, steps: State, *, into: Float32s) -> None:
        """Numbers with the settings of `as_columns`."""
        into[:] = scale(numbers_NB, steps)

    def check(self, packed: Packed) -> None:
        """Raises ValueError naming the column: NaN or infinity, or an id without a weight or a weight without an id."""
        check_numbers(packed.numbers, self.signature.packed_names(self.signature.numbers))
        self.check_weights(packed)

    def check_weights(self, packed: Packed) -> None:
        """Raises ValueError naming the columns: an id without a weight, or a weight without an id."""
        for step in [step for step in self.features if step.get("weights")]:
            absent = packed.numbers[:, self._number_places[step["weights"]]] == MISSING_NUMBER
            odd = absent != (packed.keys[:, self._key_places[step["column"]]] == NO_KEY)
            if odd.any():
                what = f"columns '{step['column']}' and '{step['weights']}' have lists of different lengths"
                raise ValueError(f"{what}, or a null weight, at row {np.argwhere(odd)[0][0]}")


def _stacked(keys: Sequence[Int64s]) -> Int64s:
    """Keys [B, slots] of features as [S, B]."""
    return np.concatenate([key.T for key in keys]) if len(keys) > 1 else np.ascontiguousarray(keys[0].T)


def bucket_keys(numbers: Float64s, boundaries: Sequence[float]) -> Int64s:
    """Bucket 0 lies below the first edge, an edge opens the bucket at its right; missing stays missing."""
    buckets = np.searchsorted(np.asarray(boundaries, np.float64), numbers, side="right").astype(np.int64)
    return np.where((numbers == MISSING_NUMBER) | np.isnan(numbers), MISSING_KEY, buckets)


def crossed(parts: Sequence[Int64s]) -> Int64s:
    """One key of several, in their order; missing where a part is."""
    crossed = np.zeros_like(parts[0])
    for part in parts:
        crossed = mix(crossed ^ mix(part).view(np.int64)).view(np.int64)
    missing = np.any([part == MISSING_KEY for part in parts], axis=0)
    return np.where(missing, MISSING_KEY, not_reserved(crossed))


def scale(numbers: Float64s, step: State) -> Float64s:
    """Fill, clip, log1p, scale, in this order and in float64; min-max scaling takes the lowest number and the range.

    Numbers [B] with the settings of one step, or [N, B] with those of `as_columns`.
    """
    x: Float64s = np.where(numbers > MISSING_NUMBER, numbers, step["fill"])  # NaN isn't above it either
    if step["clip"] is not None:
        low, high = np.moveaxis(np.asarray(step["clip"], np.float64), -1, 0)
        np.clip(x, low, high, out=x)
    if np.all(step["log1p"]):
        x = _log1p(np.maximum(x, 0.0, out=x))
    elif (logs := np.flatnonzero(step["log1p"])).size:
        x[logs] = _log1p(np.maximum(x[logs], 0.0))
    x -= step["mean"]
    x /= step["std"]
    return x


def _log1p(x: Float64s) -> Float64s:
    """log(1 + x), with what 1 + x lost given back; where numpy has no vectors for its log1p, in half of its time."""
    above = x + 1.0
    lost: Float64s = above - 1.0
    np.subtract(x, lost, out=lost)
    lost /= above
    lost += np.log(above, out=above)
    return lost


def as_columns(steps: Sequence[State]) -> dict[str, npt.NDArray[Any]]:
    """The scaling of several numbers as one: columns [N, 1], and [N, 1, 2] for the ends of clipping."""
    clips = np.array([step["clip"] or (-np.inf, np.inf) for step in steps], np.float64).reshape(-1, 1, 2)
    kinds = {"fill": float, "mean": float, "std": float, "log1p": bool}
    return {"clip": clips} | {
        name: np.array([step[name] for step in steps], kind)[:, None] for name, kind in kinds.items()
    }


def cached(columns: int, *, rows: int) -> list[slice]:
    """Columns by as many as the processor's cache holds at once."""
    together = max(1, (1 << 16) // max(1, rows))
    return [slice(first, min(first + together, columns)) for first in range(0, columns, together)]
