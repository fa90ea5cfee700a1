"""Target encodings of the training rows: each row sees the labels of the other folds alone.

What a value's rows say about the label goes to the network beside that very label, so a row that counted itself would
learn to trust an input that leaks (Prokhorenkova et al. 2018, section 3.2). Other splits and requests take the
statistics of all training rows, from `transform/`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from etl.artifact import Json
from etl.lookup import Vocabulary
from etl.pack import pack_checked
from etl.transform import Float32s, Float64s, Int64s, Signature, crossed, mix

FOLDS = "folds"
"""Folder, beside the staged training rows, of key, fold, rows and ones of each target encoding."""


def start_of(seed: int) -> int:
    """What the position of a row is mixed with, as an unsigned number of 64 bits."""
    return int(mix(mix(np.array([seed], np.int64)).view(np.int64))[0])


def fold_of(positions: Int64s, *, seed: int, folds: int) -> Int64s:
    """The fold, 0 to folds - 1, of each training row: a hash of seed and position, whatever the batches."""
    start = np.array([start_of(seed)], np.uint64).view(np.int64)
    return (mix(positions ^ start) % np.uint64(folds)).astype(np.int64)


def rate_of(ones: int, rows: int) -> float:
    """Share of ones; 1/2 where there are no rows."""
    return ones / rows if rows else 0.5


def smoothed(ones: Int64s, rows: Int64s, *, rate: float, smoothing: float) -> Float64s:
    """(ones + smoothing * rate) / (rows + smoothing); the rate where there are no rows."""
    weights = np.where(rows > 0, rows + smoothing, 1.0)
    return np.where(rows > 0, (ones + smoothing * rate) / weights, rate)


@dataclass(frozen=True)
class _Held:
    """One target encoding: values float32 [V + 1, folds] of row `vocabulary(key)`, seen from each fold."""

    by: tuple[str, ...]
    seed: int
    vocabulary: Vocabulary
    values: Float32s

    def __call__(self, keys: Mapping[str, Int64s], positions: Int64s) -> Float32s:
        rows = self.vocabulary(crossed([keys[column] for column in self.by]))
        return self.values[rows, fold_of(positions, seed=self.seed, folds=self.values.shape[1])]


class OutOfFold:
    """The target encodings of a dataset folder whose training rows are being encoded."""

    def __init__(self, targets: Mapping[str, _Held], signature: Signature) -> None:
        columns = dict.fromkeys(column for target in targets.values() for column in target.by)
        self._targets = targets
        self._signature = Signature({c: signature.columns[c] for c in columns}, tuple(columns), (), {}, ())

    @classmethod
    def load(cls, folder: Path) -> "OutOfFold":
        """Reads what the fit left in `transform/` and beside the staged rows in `raw/`."""
        state = json.loads((folder / "transform" / "transform.json").read_text(encoding="utf-8"))
        steps = [step for step in state["dense"] if step.get("kind") == "target"]
        return cls({step["name"]: _held(folder, step) for step in steps}, Signature.from_json(state["signature"]))

    def columns(self, raw: pa.Table, *, first_row: int) -> dict[str, pa.Array]:
        """The columns of raw training rows that follow one another from `first_row` on, counted from 0."""
        if not self._targets:
            return {}
        packed = pack_checked(raw.select(list(self._signature.columns)), self._signature)
        keys = {column: packed.keys[:, at] for at, column in enumerate(self._signature.keys)}
        positions = np.arange(first_row, first_row + raw.num_rows, dtype=np.int64)
        return {name: pa.array(target(keys, positions)) for name, target in self._targets.items()}


def _held(folder: Path, step: Json) -> _Held:
    totals = _integers(folder / "transform" / "encoding" / f"{step['name']}.parquet", ["key", "rows", "ones"])
    own = _integers(folder / "raw" / FOLDS / f"{step['name']}.parquet", ["key", "fold", "rows", "ones"])
    vocabulary = Vocabulary(totals["key"], np.arange(1, len(totals["key"]) + 1, dtype=np.int64))
    at = vocabulary(own["key"])
    values = np.empty((len(totals["key"]) + 1, step["folds"]), np.float32)
    for fold in range(step["folds"]):
        mine = own["fold"] == fold
        rows, ones = (np.append(0, totals[name]) for name in ("rows", "ones"))
        rows[at[mine]] -= own["rows"][mine]
        ones[at[mine]] -= own["ones"][mine]
        rows[0] = ones[0] = 0
        others = (step[name] - int(own[name][mine].sum()) for name in ("ones", "rows"))
        values[:, fold] = smoothed(ones, rows, rate=rate_of(*others), smoothing=step["smoothing"])
    return _Held(tuple(step["by"]), step["seed"], vocabulary, values)


def _integers(path: Path, names: list[str]) -> dict[str, npt.NDArray[np.int64]]:
    table = pq.read_table(path, columns=names)
    return {name: table[name].to_numpy() for name in names}
