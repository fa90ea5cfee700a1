"""Categorify's values in the order of all engines: the vocabulary file, and a file for Categorify itself.

Ties in NVTabular's order depend on numpy's sort, and so on its version. Its counts are right, so the order is made of
them as the polars engine makes it. A missing id comes first, with a code of its own that is never null's.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from etl.engines.fitting import Fitting
from etl.engines.nvtabular.plan import Looked
from etl.engines.vocabulary import grown, values_of
from etl.faults import Fault
from etl.pack import text_keys
from etl.transform import MISSING_KEY, RESERVED_KEYS


def fit_table(name: str, users: Sequence[Looked], *, found: Path, ordered: Path, fitting: Fitting) -> int:
    """Rows of a table; `found` is Categorify's file: keys, and how often each was seen. Writes `ordered` for it.

    Raises:
        Fault: two texts of the training rows with one 64-bit key.
    """
    rules = users[0]
    seen = pq.read_table(found)
    key, count = (seen[column].to_numpy() for column in seen.column_names[:2])
    counts = pl.DataFrame({"key": key, "count": count.astype(np.int64)}).filter(~pl.col("key").is_in(RESERVED_KEYS))
    if rules.dtype == "string":
        counts = _texts(name, users, rows=fitting.new).join(counts, on="key", how="inner")
    else:
        counts = counts.with_columns(value="key")
    empty = counts.select("value", "count").head(0)
    vocabulary, rejected = grown(counts, old=empty, rejected=empty, rules=rules)
    row = pl.int_range(1, vocabulary.height + 1, dtype=pl.Int64, eager=True)
    keyed = vocabulary.join(counts.select("value", "key"), on="value", how="left", maintain_order="left")
    fitting.write(f"transform/vocabulary/{name}.parquet", keyed.select("value", "key", row=row, count="count"))
    if rules.min_count > 1 or rules.max_rows:
        fitting.write(f"counts/{name}.parquet", rejected)
    in_order = np.append(MISSING_KEY, keyed["key"].to_numpy())
    pq.write_table(pa.table({seen.column_names[0]: in_order}), ordered)
    return vocabulary.height + 1


def _texts(name: str, users: Sequence[Looked], *, rows: pl.LazyFrame) -> pl.DataFrame:
    """value, key: every text of the columns, once."""
    values = values_of(users, rows).unique().collect(engine="streaming")["value"]
    keys = text_keys(values.to_arrow())
    if len(np.unique(keys)) < len(keys):
        remedy = "set hash_rows for this feature, where collisions are expected"
        raise Fault(f"features.{name}", got="two values with one 64-bit key", wanted="a key a value", remedy=remedy)
    return pl.DataFrame({"value": values, "key": pl.Series(keys, dtype=pl.Int64)})
