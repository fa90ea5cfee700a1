"""Negative sampling for implicit feedback: rows with an item that the user did not take."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from etl.data_spec import Negatives
from etl.faults import Fault
from etl.origin import ROW
from etl.pack import text_keys
from etl.reader import USER
from etl.transform import MISSING_KEY, Int64s, mix


class Sampler:
    """Draws exactly, without trial and error: from the weights of all items with those of the taken ones cut out.

    Holds in memory the training items with their attributes, and each pair of user and item of the log once; while it
    is made, the keys of items and users of all rows.
    """

    def __init__(self, negatives: Negatives, *, staged: Sequence[Path]) -> None:
        self._negatives = negatives
        keys = np.concatenate([item for item, _ in _log(negatives, staged[0])])
        self._items, first, counts = np.unique(keys[keys != MISSING_KEY], return_index=True, return_counts=True)
        if not len(self._items):
            got, remedy = "no item in the training rows", "check the column, and null_values"
            raise Fault("data.negatives.item", got=got, wanted="at least one", remedy=remedy)
        self._pool = _rows(staged[0], rows=np.flatnonzero(keys != MISSING_KEY)[first], names=self._drawn)
        weights = counts if negatives.by == "popularity" else np.ones_like(counts)
        self._starts = np.concatenate([[0], np.cumsum(weights)])
        taken = _Taken(negatives, staged, items=self._items, starts=self._starts) if negatives.user else None
        self._taken = taken
        self._seed = mix(np.array([negatives.seed], np.int64)).view(np.int64)

    @property
    def _drawn(self) -> list[str]:
        return [self._negatives.item, *self._negatives.attributes]

    def expand(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The rows, each positive one followed by its negatives.

        Raises:
            Fault: a user that has taken every training item; names it.
        """
        count, rows = self._negatives.count, batch.num_rows
        positive = self._positive(batch)
        index = np.repeat(np.arange(rows), 1 + count * positive)
        drawn = np.diff(index, prepend=-1) == 0
        drawn_for = np.repeat(np.flatnonzero(positive), count)
        items = self._draw(batch.take(pa.array(drawn_for)))
        taken = batch.take(pa.array(index))
        columns = dict(zip(taken.schema.names, taken.columns, strict=True))
        at = np.where(drawn, rows + np.cumsum(drawn) - 1, index)
        for name in self._drawn:
            both = pa.concat_arrays([batch[name], *self._pool[name].take(pa.array(items)).chunks])
            columns[name] = both.take(pa.array(at))
        for name in [name for name in columns if name.startswith("label:")]:
            columns[name] = pa.array(np.where(drawn, np.float32(0), columns[name].to_numpy()))
        return pa.record_batch(columns)

    def _positive(self, batch: pa.RecordBatch) -> npt.NDArray[np.bool_]:
        if self._negatives.positive is None:
            return np.ones(batch.num_rows, dtype=bool)
        found: npt.NDArray[np.bool_] = batch[f"label:{self._negatives.positive}"].to_numpy() == 1.0
        return found

    def _draw(self, rows: pa.RecordBatch) -> Int64s:
        """An item's place in the pool for each row; a row of the log comes once a draw."""
        log = rows[ROW].to_numpy()
        draw = np.arange(len(log), dtype=np.int64) % self._negatives.count
        chance = mix(mix(log ^ self._seed).view(np.int64) + draw)
        point = self._beside_own(_places(self._items, _keys(rows[self._negatives.item])), chance)
        if self._taken:
            user = text_keys(rows[USER])
            point = np.where(user == MISSING_KEY, point, self._taken.beside(user, chance))
        if (point < 0).any():
            raise self._no_item(rows, int(np.argmax(point < 0)))
        places: Int64s = np.searchsorted(self._starts, point, side="right") - 1
        return places

    def _beside_own(self, own: Int64s, chance: npt.NDArray[np.uint64]) -> Int64s:
        """A point of the weights of all items but the row's own; -1 where there is no other."""
        weight: Int64s = np.where(own >= 0, self._starts[own + 1] - self._starts[own], 0)
        point = _scaled(chance, self._starts[-1] - weight)
        moved: Int64s = point + np.where((own >= 0) & (point >= self._starts[own]), weight, 0)
        return moved

    def _no_item(self, rows: pa.RecordBatch, at: int) -> Fault:
        user = rows[USER][at].as_py() if self._negatives.user else None
        got = f"user '{user}' with rows of all {len(self._items)} training items" if user else "one training item alone"
        remedy = "drop these rows, give more items, or set exclude = 'event'"
        return Fault("data.negatives", got=got, wanted="an item left to draw", remedy=remedy)


class _Taken:
    """What each user took, as stretches of the weights of all items laid end to end."""

    def __init__(self, negatives: Negatives, staged: Sequence[Path], *, items: Int64s, starts: Int64s) -> None:
        logs = [part for path in staged for part in _log(negatives, path)]
        item, user = (np.concatenate(part) for part in zip(*logs, strict=True))
        place = _places(items, item)
        taken = (place >= 0) & (user != MISSING_KEY)
        self._users, owner = np.unique(user, return_inverse=True)
        pairs = np.unique(owner[taken] * len(items) + place[taken])
        owner, place = pairs // len(items), pairs % len(items)
        weight = starts[place + 1] - starts[place]
        self._first = np.searchsorted(owner, np.arange(len(self._users)))
        self._sums = np.concatenate([[0], np.cumsum(weight)])  # of the weights of all pairs before
        self._total = int(starts[-1])
        inside = self._sums[:-1] - self._sums[self._first[owner]]  # the same, of the user's own pairs
        self._cuts = owner * (self._total + 1) + starts[place] - inside

    def beside(self, user: Int64s, chance: npt.NDArray[np.uint64]) -> Int64s:
        """A point of the weights of all items but the user's; -1 where the user took all.

        With the taken stretches cut out, the n-th starts at its own start less the lengths of those before; a point
        moves on by the lengths of all that start at or before it.
        """
        owner = np.searchsorted(self._users, user)
        owner = np.where(user == MISSING_KEY, 0, owner)
        before = self._sums[self._first[owner]]
        ends = np.append(self._first[1:], len(self._sums) - 1)
        point = _scaled(chance, self._total - (self._sums[ends[owner]] - before))
        passed = np.searchsorted(self._cuts, owner * (self._total + 1) + point, side="right")
        return np.where(point < 0, -1, point + self._sums[np.maximum(passed, self._first[owner])] - before)


def _scaled(chance: npt.NDArray[np.uint64], size: Int64s) -> Int64s:
    """Below `size`; -1 where that is 0."""
    point: Int64s = (chance % np.maximum(size, 1).astype(np.uint64)).astype(np.int64)
    return np.where(size == 0, -1, point)


def _log(negatives: Negatives, path: Path) -> Iterator[tuple[Int64s, Int64s]]:
    """Keys of item and user, batch by batch; the user's stands for missing where draws do not depend on it."""
    names = [negatives.item, *([USER] if negatives.user else [])]
    for batch in pq.ParquetFile(path).iter_batches(columns=names):
        user = text_keys(batch[USER]) if negatives.user else np.full(batch.num_rows, MISSING_KEY)
        yield _keys(batch[negatives.item]), user


def _keys(items: pa.Array) -> Int64s:
    if pa.types.is_integer(items.type):
        keys: Int64s = items.fill_null(MISSING_KEY).to_numpy(zero_copy_only=False)
        return keys
    return text_keys(items)


def _places(items: Int64s, keys: Int64s) -> Int64s:
    """Where each key stands among the sorted ones; -1 where it does not."""
    at = np.minimum(np.searchsorted(items, keys), len(items) - 1)
    return np.where(items[at] == keys, at, -1)


def _rows(path: Path, *, rows: Int64s, names: list[str]) -> pa.Table:
    """Rows of a parquet file, in the order in which they are named, read batch by batch."""
    order, found, first = np.argsort(rows, kind="stable"), [], 0
    ascending = rows[order]
    for batch in pq.ParquetFile(path).iter_batches(columns=names):
        here = ascending[np.searchsorted(ascending, first) : np.searchsorted(ascending, first + batch.num_rows)]
        found.append(batch.take(pa.array(here - first)))
        first += batch.num_rows
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    return pa.Table.from_batches(found).combine_chunks().take(pa.array(back))
