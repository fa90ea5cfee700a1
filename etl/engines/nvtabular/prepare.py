"""Typed rows -> the rows that NVTabular reads: nothing in them is null, wraps, rounds or is empty.

- Every id is the 64-bit key that serving looks up; a missing one is a key of its own. So no column of whole numbers
  becomes float64, no null is marked at another row, and no partition is without values.
- Every list ends with a mark, so that none is empty; a missing id within a list is the same key as elsewhere.
- Numbers are float64, null where missing, a column a feature: NVTabular fills in place.
- A row group a batch, and none without rows.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from etl.engines import place_of
from etl.engines.nvtabular.plan import KeyColumn, Plan
from etl.faults import Fault
from etl.pack import pack, text_keys, typed_column
from etl.spec import column_of
from etl.transform import MISSING_KEY, MISSING_NUMBER, NO_KEY, Packed, Signature, Transform
from etl.typed import Typed, of_size


def prepare(rows: Typed, target: Path, *, plan: Plan, checked: Transform, batch_rows: int) -> int:
    """Writes the prepared rows of a split, whose name is the file's, a row group a batch; returns their number.

    Raises:
        Fault: a value that can't be packed, with its rows, as the served transform would say.
    """
    done = 0
    writer: pq.ParquetWriter | None = None
    for batch in of_size(rows.batches(), rows=batch_rows):
        place = place_of(target.stem, first=done, rows=batch.num_rows)
        raw = pa.Table.from_batches([batch]).select(list(checked.signature.columns))
        table = _prepared(raw, plan=plan, checked=checked, place=place)
        writer = writer or pq.ParquetWriter(target, table.schema)
        writer.write_table(table, row_group_size=batch_rows)
        done += batch.num_rows
    if writer is not None:
        writer.close()
    return done


def _prepared(raw: pa.Table, *, plan: Plan, checked: Transform, place: str) -> pa.Table:
    signature = checked.signature
    try:
        packed = pack(raw, signature)
        checked.check(packed)
    except ValueError as error:
        wanted = f"the columns {', '.join(f'{name} ({dtype})' for name, dtype in signature.columns.items())}"
        raise Fault(place, got=str(error), wanted=wanted, remedy="mend the rows or the feature") from None
    columns = {key.name: _keys(key, raw, packed=packed, signature=signature) for key in plan.keys.values()}
    places = signature.places(signature.numbers)
    for name, feature in plan.numbers.items():
        numbers = packed.numbers[:, places[column_of(feature)].start]
        columns[name] = pa.array(np.ascontiguousarray(numbers), mask=(numbers == MISSING_NUMBER) | np.isnan(numbers))
    return pa.table(columns)


def _keys(key: KeyColumn, raw: pa.Table, *, packed: Packed, signature: Signature) -> pa.Array:
    if not key.listed:
        at = signature.places(signature.keys)[key.raw].start
        return pa.array(np.ascontiguousarray(packed.keys[:, at]))
    lists = typed_column(raw[key.raw], name=key.raw, dtype=signature.columns[key.raw])
    values = lists.values
    if values.type == pa.large_string():
        keys = text_keys(values)
    else:
        keys = pc.fill_null(values, MISSING_KEY).to_numpy(zero_copy_only=False)
    return marked(np.asarray(lists.offsets), keys)


def marked(offsets: npt.NDArray[np.int64], keys: npt.NDArray[np.int64]) -> pa.ListArray:
    """Lists of keys, each with the mark at its end."""
    size = len(offsets) - 1
    ends = offsets[1:] + np.arange(size)
    with_marks = np.empty(len(keys) + size, np.int64)
    is_key = np.ones(len(with_marks), np.bool_)
    is_key[ends] = False
    with_marks[is_key], with_marks[ends] = keys, NO_KEY
    return pa.ListArray.from_arrays(pa.array(np.append(0, ends + 1).astype(np.int32)), pa.array(with_marks))


def unmarked(lists: Any) -> pa.LargeListArray:
    """Lists of numbers without the last of each."""
    offsets = np.asarray(lists.offsets).astype(np.int64)
    flat = lists.values.to_numpy(zero_copy_only=False)
    first, flat = offsets - offsets[0], flat[offsets[0] : offsets[-1]]
    kept = np.ones(len(flat), np.bool_)
    kept[first[1:] - 1] = False
    return pa.LargeListArray.from_arrays(pa.array(first - np.arange(len(first))), pa.array(flat[kept]))
