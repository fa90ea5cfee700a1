"""What the Workflow wrote -> ids and floats in the order of the schema, and counts of missing and unseen values."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from etl.engines import place_of
from etl.engines.nvtabular.plan import Plan
from etl.engines.nvtabular.prepare import unmarked
from etl.pack import finite, pack
from etl.transform import MISSING_NUMBER, NO_KEY, Encoded, Float64s, Int64s, Signature, State, Transform

FIRST_CODE = 3
"""The code of Categorify's first value; those below stand for padding, null and unseen."""


class Parts:
    """The parts of a split, a file each, in row order."""

    def __init__(self, files: Sequence[Path], rows: Sequence[int]) -> None:
        self._files, self._ends = list(files), np.cumsum(rows)
        self._read = lru_cache(maxsize=4)(pq.read_table)

    @property
    def rows(self) -> int:
        """Rows of all parts."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def __call__(self, first: int, rows: int) -> pa.Table:
        """Rows `first` to `first + rows - 1`."""
        found, last = [], first + rows
        for at in range(int(np.searchsorted(self._ends, first, side="right")), len(self._files)):
            start = int(self._ends[at - 1]) if at else 0
            if start >= last:
                break
            low, high = max(first - start, 0), min(last, int(self._ends[at])) - start
            found.append(self._read(self._files[at]).slice(low, high - low))
        return pa.concat_tables(found)


class Coded:
    """Encodes the rows of one split from its parts. Ids of a list beyond `max_length` are dropped, oldest first."""

    def __init__(self, parts: Parts, *, plan: Plan, transform: Transform, split: str) -> None:
        features, signature = transform.features, transform.signature
        self._parts, self._plan, self._features, self._dense = parts, plan, features, transform.dense
        self._transform, self._split = transform, split
        self._weights = _of_weights(features, signature)
        self._encodings = _of_encodings(transform)
        keys = {plan.of[step["name"]]: step for step in features if step["kind"] != "field"}
        listed = {name: step["column"] for name, step in keys.items() if step.get("column") in signature.slots}
        self._ids = Signature(
            columns={name: "list<int64>" if name in listed else "int64" for name in keys},
            keys=tuple(keys),
            numbers=(),
            slots={name: signature.slots[column] for name, column in listed.items()},
            newest=tuple(name for name, column in listed.items() if column in signature.newest),
        )
        self._places = self._ids.places(self._ids.keys)

    def __call__(self, raw: pa.Table, first: int) -> Encoded:
        """Ids and floats of these rows of the split. Raises Fault where float32 can't hold a number."""
        coded = self._parts(first, raw.num_rows)
        packed = pack(pa.table({name: self._column(name, coded) for name in self._ids.keys}), self._ids)
        ids = [self._rows(step, packed.keys) for step in self._features]
        zeros = np.array([np.count_nonzero(rows == 0) for rows in ids], np.int64)
        unseen = np.array([np.count_nonzero(rows == UNSEEN) for rows in ids], np.int64)
        none = np.empty((raw.num_rows, 0))
        dense = self._dense_columns(raw, coded)
        weights = pack(raw.select(list(self._weights.numbers)), self._weights).numbers
        values = [v for step in self._features if (v := self._values(step, coded, weights=weights)) is not None]
        rows = [np.where(row == NO_KEY, -1, np.maximum(row, 0)) for row in ids]
        with np.errstate(over="ignore"):  # it becomes infinity
            floats = _beside([none, *dense, *values]).astype(np.float32)
        encoded = Encoded(_beside([none.astype(np.int64), *rows]), floats, zeros, unseen)
        place = place_of(self._split, first=first, rows=raw.num_rows)
        return finite(encoded, self._transform, place=place)

    def _dense_columns(self, raw: pa.Table, coded: pa.Table) -> list[npt.NDArray[Any]]:
        """Dense inputs [B, 1] in the schema's order: encodings by the served transform, numbers by the Workflow."""
        signature = self._encodings.signature
        encoded = iter(self._encodings.apply(pack(raw.select(list(signature.columns)), signature)).floats.T)
        return [
            (next(encoded) if "by" in step else coded[self._plan.of[step["name"]]].to_numpy())[:, None]
            for step in self._dense
        ]

    def _column(self, name: str, coded: pa.Table) -> pa.Array:
        """Rows of the table as numbers or lists of them: 0 missing, -1 unseen."""
        column = coded[name].combine_chunks()
        column = pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column
        if name in self._ids.slots:
            column = unmarked(column)
        if name not in self._plan.vocabulary_columns:
            return column
        values = column.values if name in self._ids.slots else column
        rows = pa.array(values.to_numpy(zero_copy_only=False) - FIRST_CODE)
        return pa.LargeListArray.from_arrays(column.offsets, rows) if name in self._ids.slots else rows

    def _rows(self, step: State, keys: Int64s) -> Int64s:
        if step["kind"] == "field":
            return np.ones((len(keys), 1), np.int64)
        return keys[:, self._places[self._plan.of[step["name"]]]]

    def _values(self, step: State, coded: pa.Table, *, weights: Float64s) -> Float64s | None:
        if step["kind"] == "field":
            numbers: npt.NDArray[np.float64] = coded[self._plan.of[step["name"]]].to_numpy()
            return numbers[:, None]
        if not step.get("weights"):
            return None
        found = weights[:, self._weights.places(self._weights.numbers)[step["weights"]]]
        return np.where(found == MISSING_NUMBER, 0.0, found)


UNSEEN = -1


def _of_weights(features: Sequence[State], signature: Signature) -> Signature:
    """What packs the weight columns alone."""
    names = tuple(dict.fromkeys(step["weights"] for step in features if step.get("weights")))
    slots: Mapping[str, int] = {name: signature.slots[name] for name in names}
    return Signature({name: signature.columns[name] for name in names}, (), names, dict(slots), ())


def _of_encodings(transform: Transform) -> Transform:
    """What looks up the target and count encodings alone."""
    steps = [step for step in transform.dense if "by" in step]
    keys = tuple(dict.fromkeys(column for step in steps for column in step["by"]))
    columns = {name: transform.signature.columns[name] for name in keys}
    signature = Signature(columns, keys, (), {}, ()).as_json()
    return Transform({"signature": signature, "features": [], "dense": steps}, {}, encodings=transform.encodings)


def _beside(parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Matrices [B, ...] side by side, stored column by column: columns are what is read and written."""
    joined: npt.NDArray[Any] = np.concatenate([part.T for part in parts])
    return joined.T
