"""Fits target and count encodings on the typed training rows: rows, and ones among them, by value."""

from collections.abc import Sequence

import numpy as np
import polars as pl

from etl.artifact import Json
from etl.engines.fitting import Fitting
from etl.faults import Fault
from etl.folds import FOLDS, rate_of, smoothed, start_of
from etl.pack import text_keys
from etl.spec import Count, Target, Task
from etl.transform import MISSING_KEY, Float64s, Int64s, crossed

_POSITION = "position:"
_SUMS = ("rows", "ones")


def fit_encoding(feature: Target | Count, tasks: Sequence[Task], *, fitting: Fitting) -> Json:
    """The step of an encoding; its values are written. Raises Fault where two values have one 64-bit key."""
    if isinstance(feature, Count):
        return _count(feature, fitting)
    return _target(feature, next(task for task in tasks if task.name == feature.task), fitting=fitting)


def _count(feature: Count, fitting: Fitting) -> Json:
    """Rows by value. A count holds no label, so the training rows take it as all others do."""
    new = fitting.new.select(_values(feature.by)).drop_nulls().group_by(pl.all()).agg(rows=pl.len().cast(pl.Int64))
    totals = _added(feature, new.collect(), fitting=fitting)
    rows = totals["rows"].to_numpy()
    value = np.log1p(rows) if feature.log1p else rows.astype(np.float64)
    _write(feature, totals, value=value, fitting=fitting)
    return {"name": feature.name, "kind": "count", "by": feature.by, "other": 0.0}


def _target(feature: Target, task: Task, *, fitting: Fitting) -> Json:
    """Rows and ones by value, and by value and fold for the training rows' own numbers (`etl.folds`).

    Rows for which the task is not defined do not count. Rows without a value count for the rate of all rows alone.
    """
    by_fold = _by_fold(feature, task, fitting=fitting)
    fitting.write(f"raw/{FOLDS}/{feature.name}.parquet", by_fold.select("fold", *_SUMS, key=_keys(feature, by_fold)))
    new = by_fold if fitting.parent is None or fitting.parent.new_rows else by_fold.clear()
    values = [pl.col(f"value:{column}") for column in feature.by]
    totals = _added(feature, new.drop_nulls().group_by(values).agg(pl.col(_SUMS).sum()), fitting=fitting)
    old = fitting.parent.step(feature.name) if fitting.parent else {"rows": 0, "ones": 0}
    rows, ones = (int(old[name]) + int(new[name].sum()) for name in _SUMS)
    rate = rate_of(ones, rows)
    sums = (totals[name].to_numpy() for name in ("ones", "rows"))
    _write(feature, totals, value=smoothed(*sums, rate=rate, smoothing=feature.smoothing), fitting=fitting)
    step = {"name": feature.name, "kind": "target", "by": feature.by, "other": rate, "rows": rows, "ones": ones}
    return step | {"smoothing": feature.smoothing, "folds": feature.folds, "seed": feature.seed}


def fold(position: pl.Expr, *, seed: int, folds: int) -> pl.Expr:
    """`etl.folds.fold_of` as a query: splitmix64 in unsigned numbers of 64 bits, which wrap around."""

    def number(value: int) -> pl.Expr:
        return pl.lit(value, dtype=pl.UInt64)

    z = (position.cast(pl.UInt64) ^ number(start_of(seed))) + number(0x9E3779B97F4A7C15)
    z = (z ^ (z // number(1 << 30))) * number(0xBF58476D1CE4E5B9)
    z = (z ^ (z // number(1 << 27))) * number(0x94D049BB133111EB)
    return ((z ^ (z // number(1 << 31))) % number(folds)).cast(pl.Int64)


def _by_fold(feature: Target, task: Task, *, fitting: Fitting) -> pl.DataFrame:
    """value:<column>..., fold, rows, ones of the present training rows, in a fixed order."""
    typed = fitting.train.rows.with_row_index(_POSITION)
    counted = typed.filter(pl.col(f"label:{task.given}") == 1) if task.given else typed
    own = fold(pl.col(_POSITION), seed=feature.seed, folds=feature.folds)
    rows = counted.select(_values(feature.by), fold=own, one=pl.col(f"label:{task.name}").cast(pl.Int64))
    keys = [f"value:{column}" for column in feature.by]
    sums = rows.group_by(*keys, "fold").agg(rows=pl.len().cast(pl.Int64), ones=pl.col("one").sum())
    return sums.collect().sort(*keys, "fold")


def _values(by: Sequence[str]) -> list[pl.Expr]:
    return [pl.col(column).alias(f"value:{column}") for column in by]


def _added(feature: Target | Count, new: pl.DataFrame, *, fitting: Fitting) -> pl.DataFrame:
    """value:<column>..., rows and ones over the parent's rows and the new ones: most rows first, ties by value."""
    values = [f"value:{column}" for column in feature.by]
    old = fitting.of_parent(_file(feature), new.clear()).select(new.columns)
    sums = pl.concat([old, new]).group_by(values).agg(pl.all().sum())
    return sums.sort("rows", *values, descending=[True, *(False for _ in values)])


def _write(feature: Target | Count, totals: pl.DataFrame, *, value: Float64s, fitting: Fitting) -> None:
    keys = _keys(feature, totals)
    if keys.n_unique() < len(keys):
        got, remedy = "two values with one 64-bit key", "leave out a column of 'by'"
        raise Fault(f"features.{feature.name}", got=got, wanted="a key a value", remedy=remedy)
    fitting.write(_file(feature), totals.with_columns(key=keys, value=pl.Series(value)))


def _file(feature: Target | Count) -> str:
    return f"transform/encoding/{feature.name}.parquet"


def _keys(feature: Target | Count, table: pl.DataFrame) -> pl.Series:
    """The key of each row's values, as the transform makes it."""
    return pl.Series(crossed([_column_keys(table[f"value:{column}"]) for column in feature.by]), dtype=pl.Int64)


def _column_keys(values: pl.Series) -> Int64s:
    if values.dtype == pl.Int64:
        return values.fill_null(MISSING_KEY).to_numpy()
    return text_keys(values.to_arrow())
