"""Raw files -> typed Arrow batches. What is malformed is a fault with its file and rows; nothing is coerced."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from etl.columns import labels_of, typed, weights_of
from etl.data_spec import History
from etl.faults import Fault
from etl.formats import raw_batches, split_texts
from etl.pack import text_keys
from etl.schema import GROUP, WEIGHT
from etl.spec import Bag, FeatureSpec, column_of, resolve
from etl.threads import in_order
from etl.times import WHOLE, clock, days_of
from etl.transform import Int64s

SPLIT, USER, DAY = "split:", "negatives:user", "day:"

_Placed = tuple[int, str, pa.RecordBatch]
"""The place of a file among others, the place of a batch in words, and the batch as it is read."""


class Part(NamedTuple):
    """Raw rows that follow one another, and what types them; raises Fault as `Reader.batches`."""

    rows: int
    typed: Callable[[], pa.RecordBatch]


class Reader:
    """Reads the raw files of one spec; sees to it that a time column is of one kind in all of them."""

    def __init__(self, spec: FeatureSpec) -> None:
        self._spec = spec
        self.rows: dict[Path, int] = {}
        """Of each file that was read to its end."""
        self._clocks: dict[str, str] = {}
        self._file_columns, self._separators = spec.file_columns(), spec.separators()
        self._bags = [f for f in resolve(spec.features) if isinstance(f, Bag) and column_of(f) in self._file_columns]

    def batches(self, paths: Sequence[Path]) -> Iterator[pa.RecordBatch]:
        """Batches of all feature columns, typed and named as in the raw files, and beside them

        - `label:<task>`, float32; `group:`, int64, if the spec names a group; `weight:`, float32, if it names one;
        - `day:`, see `labels`;
        - `split:`, int64, the time or the group by which rows are divided;
        - `history:<i>:user` (int64 key), `history:<i>:time` (int64), `history:<i>:event` (bool) of each history;
        - `negatives:user`, text, where draws depend on the user.

        Raises:
            Fault: an unreadable or truncated file, a missing column, a value of the wrong type, a label not 0/1.
        """
        yield from self._in_order(self._typed, self._placed(paths, names=self._needed()))

    def parts(self, paths: Sequence[Path]) -> Iterator[Part]:
        """The same batches of files without times, not yet typed."""
        for part in self._placed(paths, names=self._needed()):
            yield Part(part[2].num_rows, partial(self._typed, part))

    def _typed(self, part: "_Placed") -> pa.RecordBatch:
        at, place, batch = part
        beside = self._labels(batch, place, file=at) | self._extras(batch, place) | self._taken(batch, place)
        return pa.record_batch(self._features(batch, place) | beside)

    def labels(self, paths: Sequence[Path]) -> Iterator[pa.RecordBatch]:
        """The labels alone, and `day:`, int32: days since 1970 (see `by_day`), or the place of the row's file in paths.

        Raises Fault as `batches`.
        """
        names = [*self._label_columns, *([self._day] if self._day else [])]
        parts = self._placed(paths, names=list(dict.fromkeys(names)))
        yield from self._in_order(self._label_batch, parts)

    def _label_batch(self, part: "_Placed") -> pa.RecordBatch:
        at, place, batch = part
        return pa.record_batch(self._labels(batch, place, file=at))

    def _in_order(
        self, typed: Callable[["_Placed"], pa.RecordBatch], parts: Iterator["_Placed"]
    ) -> Iterator[pa.RecordBatch]:
        """The first batch alone: its times set the kind for all others."""
        yield from map(typed, itertools.islice(parts, 1))
        yield from in_order(typed, parts)

    @property
    def by_day(self) -> bool:
        """Whether rows are told apart by day: where the split has a column of times or dates, or of whole numbers with
        a unit. By file otherwise."""
        return self._unit is not None

    @property
    def _unit(self) -> str | None:
        """Of the times by which rows are divided; None where nothing says a day."""
        whole = self._day is None or self._clocks.get(self._day, WHOLE) == WHOLE
        return (self._spec.data.split.unit if self._day else None) if whole else "ns"

    def times(self, paths: Sequence[Path], name: str) -> Iterator[Int64s]:
        """One column as times, batch by batch. Raises Fault as `batches`."""
        for _, place, batch in self._placed(paths, names=[name]):
            yield self._times(batch[name], name=name, place=place)

    def users(self, paths: Sequence[Path], *, user: str, time: str) -> Iterator[tuple[Int64s, Int64s]]:
        """The keys of users and the times of their rows, batch by batch. Raises Fault as `batches`."""
        for _, place, batch in self._placed(paths, names=list(dict.fromkeys([user, time]))):
            keys = text_keys(_texts(batch[user], name=user, place=place))
            yield keys, self._times(batch[time], name=time, place=place)

    def boundary(self, given: int | str, *, name: str, place: str) -> int:
        """A time of the experiment file on the clock of a column that was read. Raises Fault where it is of another."""
        return int(self._times(pa.array([str(given)], pa.large_string()), name=name, place=place)[0])

    def _placed(self, paths: Sequence[Path], *, names: list[str]) -> Iterator["_Placed"]:
        for at, path in enumerate(paths):
            rows = 0
            for batch in raw_batches(self._spec.data, path, names=names):
                if batch.num_rows:
                    yield at, f"{path}: rows {rows + 1} to {rows + batch.num_rows}", batch
                rows += batch.num_rows
            self.rows[path] = rows

    def _needed(self) -> list[str]:
        data = self._spec.data
        negatives, split = data.negatives, data.split
        names: list[str | None] = [*self._file_columns, data.group, data.weight]
        names += [*self._label_columns, self._day]
        names += [split.column if data.divided else None, negatives.user if negatives else None]
        for history in data.histories:
            names += [history.user, history.time, *history.where]
        return list(dict.fromkeys(name for name in names if name is not None))

    @property
    def _labelled(self) -> bool:
        negatives = self._spec.data.negatives
        return negatives is None or negatives.positive is not None

    @property
    def _label_columns(self) -> list[str]:
        return [task.label for task in self._spec.tasks if self._labelled]

    @property
    def _day(self) -> str | None:
        """The time column by which rows are divided."""
        data = self._spec.data
        by = {"time": data.split.column, "last": data.split.time}
        return by.get(data.split.by) if data.divided else None

    def _features(self, batch: pa.RecordBatch, place: str) -> dict[str, pa.Array]:
        columns = {}
        for name, dtype in self._file_columns.items():
            column = split_texts(self._spec.data, batch[name], separator=self._separators.get(name))
            columns[name] = typed(column, name=name, dtype=dtype, place=place)
        for bag in self._bags:
            _check_bag(bag, columns, place=place)
        return columns

    def _labels(self, batch: pa.RecordBatch, place: str, *, file: int) -> dict[str, pa.Array]:
        columns: dict[str, pa.Array] = {}
        for task in self._spec.tasks:
            ones = pa.array(np.ones(batch.num_rows, np.float32))
            label = labels_of(batch[task.label], task=task, place=place) if self._labelled else ones
            columns[f"label:{task.name}"] = label
        days = np.full(batch.num_rows, file, np.int32)
        if self._day:
            times = self._times(batch[self._day], name=self._day, place=place)
            days = days_of(times, unit=self._unit, place=f"{place}, column '{self._day}'") if self._unit else days
        return columns | {DAY: pa.array(days)}

    def _extras(self, batch: pa.RecordBatch, place: str) -> dict[str, pa.Array]:
        """The group, the weight, and what rows are divided by."""
        data, columns = self._spec.data, {}
        if data.group:
            columns[GROUP] = pa.array(text_keys(_texts(batch[data.group], name=data.group, place=place)))
        if data.weight:
            columns[WEIGHT] = weights_of(batch[data.weight], name=data.weight, place=place)
        column = data.split.column
        if data.divided and column is not None and data.split.by == "time":
            columns[SPLIT] = pa.array(self._times(batch[column], name=column, place=place))
        elif data.divided and column is not None and data.split.by == "group":
            columns[SPLIT] = pa.array(text_keys(_texts(batch[column], name=column, place=place)))
        return columns

    def _taken(self, batch: pa.RecordBatch, place: str) -> dict[str, pa.Array]:
        """The event log of histories and negatives."""
        columns = {}
        for at, history in enumerate(self._spec.data.histories):
            user = _texts(batch[history.user], name=history.user, place=place)
            columns[f"history:{at}:user"] = pa.array(text_keys(user))
            columns[f"history:{at}:time"] = pa.array(self._times(batch[history.time], name=history.time, place=place))
            columns[f"history:{at}:event"] = _events(batch, history, place=place)
        negatives = self._spec.data.negatives
        if negatives and negatives.user:
            columns[USER] = _texts(batch[negatives.user], name=negatives.user, place=place)
        return columns

    def _times(self, column: pa.Array, *, name: str, place: str) -> Int64s:
        """Whole numbers as they are, times as nanoseconds. Raises Fault on a null, on others, and on a mixture."""
        place, wanted = f"{place}, column '{name}'", "whole numbers, or times and dates (text in ISO 8601), in each row"
        remedy = "mend the file; parts of a second as whole milliseconds"
        if column.null_count:
            got = f"no value in row {np.argmax(np.asarray(column.is_null())) + 1} of these"
            raise Fault(place, got=got, wanted=wanted, remedy=remedy)
        try:
            kind, times = clock(column)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise Fault(place, got=str(error), wanted=wanted, remedy=remedy) from None
        if (before := self._clocks.setdefault(name, kind)) != kind:
            raise Fault(place, got=kind, wanted=f"{before}, as before", remedy="give all times in one form")
        numbers: Int64s = times.to_numpy(zero_copy_only=False)
        return numbers


def _texts(column: pa.Array, *, name: str, place: str) -> pa.Array:
    """A user or a group as text. Raises Fault on lists and on numbers with a fraction, which ids are not."""
    kind = column.type
    if pa.types.is_floating(kind) or pa.types.is_nested(kind):
        wanted, remedy = "whole numbers or text", "write the column as int64, with nulls where it has no value"
        raise Fault(f"{place}, column '{name}'", got=str(kind), wanted=wanted, remedy=remedy)
    return column.cast(pa.large_string())


def _events(batch: pa.RecordBatch, history: History, *, place: str) -> pa.Array:
    """Which rows are events: all texts of `where` hold; a null is none."""
    event = np.ones(batch.num_rows, dtype=bool)
    for name, text in history.where.items():
        column = batch[name]
        if pa.types.is_nested(column.type):
            remedy = "name a column of single values in 'where'"
            raise Fault(f"{place}, column '{name}'", got=str(column.type), wanted="single values", remedy=remedy)
        held = pc.equal(column.cast(pa.large_string()), text).fill_null(False)
        event &= held.to_numpy(zero_copy_only=False)
    return pa.array(event)


def _check_bag(bag: Bag, columns: Mapping[str, pa.Array], *, place: str) -> None:
    """Raises Fault where a bag has more ids than it may have, or not a weight an id."""
    name = column_of(bag)
    lengths = np.diff(np.asarray(columns[name].offsets))
    if lengths.max(initial=0) > bag.max_length:
        got = f"{lengths.max()} values in row {np.argmax(lengths) + 1} of these"
        wanted, remedy = f"at most {bag.max_length}", "raise max_length of the feature, or shorten the lists"
        raise Fault(f"{place}, column '{name}'", got=got, wanted=wanted, remedy=remedy)
    if bag.weight_column is None:
        return
    weights = columns[bag.weight_column]
    odd = np.diff(np.asarray(weights.offsets)) != lengths
    if odd.any() or weights.values.null_count or not pc.all(pc.is_finite(weights.values), min_count=0).as_py():
        other = f"another number than of ids in row {np.argmax(odd) + 1} of these"
        got = other if odd.any() else "null, NaN or infinity"
        remedy = f"mend the lists of '{name}' and '{bag.weight_column}'"
        raise Fault(f"{place}, column '{bag.weight_column}'", got=got, wanted="a finite weight an id", remedy=remedy)
