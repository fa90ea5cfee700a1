"""Fits vocabularies on the typed training rows, one narrow query a table; an extension keeps every row of the old one.

The values that `min_count` or `max_rows` rejects are kept with their counts in `counts/`, outside of the transform that
is served, so that the counts of several days add up.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl
import pyarrow as pa

from etl.engines.compiled import Counter
from etl.engines.fitting import Fitting
from etl.faults import Fault
from etl.pack import text_keys
from etl.spec import Bag, Categorical, column_of
from etl.spec import Sequence as History
from etl.transform import RESERVED_KEYS

Looked = Categorical | Bag | History

_TYPES = {"string": pl.String, "int64": pl.Int64}


def fit_table(name: str, users: Sequence[Looked], *, fitting: Fitting) -> int:
    """Rows of a table that features look up; writes its vocabulary, if it has one.

    Raises:
        Fault: two values with one 64-bit key.
    """
    rules = users[0]
    if rules.hash_rows:
        return rules.hash_rows
    files = {place: f"{place}/{name}.parquet" for place in ("transform/vocabulary", "counts")}
    empty = pl.DataFrame(schema={"value": _TYPES[rules.dtype], "count": pl.Int64})
    old, rejected = (fitting.of_parent(file, empty) for file in files.values())
    vocabulary, rejected = grown(_counts(users, fitting), old=old, rejected=rejected, rules=rules)
    value = vocabulary["value"]
    keys = value.to_numpy() if rules.dtype == "int64" else text_keys(value.to_arrow())
    twice = rules.dtype == "string" and len(np.unique(keys)) < len(keys)
    if twice or np.isin(keys, RESERVED_KEYS).any():
        remedy = "set hash_rows for this feature, where collisions are expected"
        raise Fault(f"features.{name}", got="two values with one 64-bit key", wanted="a key a value", remedy=remedy)
    row = pl.int_range(1, vocabulary.height + 1, dtype=pl.Int64, eager=True)
    fitting.write(
        files["transform/vocabulary"],
        vocabulary.select("value", key=pl.Series(keys, dtype=pl.Int64), row=row, count=pl.col("count")),
    )
    if rules.min_count > 1 or rules.max_rows:
        fitting.write(files["counts"], rejected)
    return vocabulary.height + 1


def grown(
    counts: pl.DataFrame, *, old: pl.DataFrame, rejected: pl.DataFrame, rules: Looked
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The vocabulary, and the values that it rejects; both value and count.

    The counts of all days add up. The old values stay where they are, the new ones follow by count, then by value.
    """
    counts = counts.select("value", pl.col("count").cast(pl.Int64))
    more = old.select("value", "count")
    if more.height:
        added = more.select("value").join(counts, on="value", how="left", maintain_order="left")["count"]
        more = more.with_columns(pl.col("count") + added.fill_null(0))
        counts = counts.join(more, on="value", how="anti")
    if rejected.height:
        counts = pl.concat([counts, rejected]).group_by("value").agg(pl.col("count").sum())
    # Two sorts by one column each take half the time of one by both.
    counts = counts.sort("value").sort("count", descending=True, maintain_order=True)
    fit = int((counts["count"] >= rules.min_count).sum())
    kept = min(fit, rules.max_rows - 1 - more.height) if rules.max_rows else fit
    return pl.concat([more, counts.head(kept)]), counts.slice(kept)


def values_of(users: Sequence[Looked], rows: pl.LazyFrame) -> pl.LazyFrame:
    """value: those of all columns that share the table, without nulls."""
    columns = {column_of(user): isinstance(user, Bag | History) for user in users}
    values = {column: rows.select(value=column) for column in columns}
    # A query of its own, not an expression: cudf-polars knows the one alone.
    flat = [v.explode("value", empty_as_null=True) if columns[column] else v for column, v in values.items()]
    return pl.concat(flat).drop_nulls()


def _counts(users: Sequence[Looked], fitting: Fitting) -> pl.DataFrame:
    """value, count over all columns that share the table."""
    if users[0].dtype != "int64" or fitting.device == "cuda":
        return values_of(users, fitting.new).group_by("value").agg(count=pl.len()).collect()
    counter = Counter()
    for column in dict.fromkeys(column_of(user) for user in users) if fitting.is_new else ():
        for values in fitting.train.values(column):
            counter.add(values.cast(pa.int64(), safe=False).drop_null().to_numpy())
    value, count = counter.counts()
    return pl.DataFrame({"value": value, "count": count})
