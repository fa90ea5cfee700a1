"""Parquet shards of one split: their row groups, and what they hold as arrays."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from etl.faults import Fault
from etl.schema import IdFeature, Schema

REMEDY = "run 'python -m etl run' again"
Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RowGroup:
    """The unit of reading."""

    file: Path
    index: int
    rows: int
    first: int
    """The number of its first row, counted in file order over all files of the split."""


class Rows(NamedTuple):
    """Rows in memory: ids int64 [R, S], floats float32 [R, N], labels float32 [R, T], groups int64 [R, 1 or 0],
    weights float32 [R, 1 or 0].

    `numbers_R` int64 counts the rows of the split in file order.
    """

    ids_RS: Int64s
    floats_RN: npt.NDArray[np.float32]
    labels_RT: npt.NDArray[np.float32]
    groups_RG: Int64s
    weights_RW: npt.NDArray[np.float32]
    numbers_R: Int64s

    @classmethod
    def empty(cls, schema: Schema, rows: int) -> "Rows":
        """Rows to be filled: no ids and values of 0 so far, labels and the like not set."""
        return cls(
            np.full((rows, schema.slot_ends[-1] if schema.features else 0), -1, np.int64),
            np.zeros((rows, len(schema.float_names)), np.float32),
            np.empty((rows, len(schema.tasks)), np.float32),
            np.empty((rows, 1 if schema.group else 0), np.int64),
            np.empty((rows, 1 if schema.weight else 0), np.float32),
            np.empty(rows, np.int64),
        )

    @classmethod
    def bytes_each(cls, schema: Schema) -> int:
        """What one row takes."""
        return sum(part.nbytes for part in cls.empty(schema, 1))

    def take(self, which: Int64s | slice) -> "Rows":
        """Some of the rows; those of a slice stay where they are."""
        return Rows._make(part[which] for part in self)


def row_groups(folder: Path) -> list[RowGroup]:
    """Those of all files of a split, in file order. Raises Fault where a file is broken, or there are no rows."""
    found, first = [], 0
    for path in sorted(folder.glob("*.parquet")):
        try:
            metadata = pq.read_metadata(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise Fault(str(path), got=str(error), wanted="a whole parquet file", remedy=REMEDY) from None
        for at in range(metadata.num_row_groups):
            if size := metadata.row_group(at).num_rows:
                found.append(RowGroup(path, at, size, first))
                first += size
    if not found:
        raise Fault(str(folder), got="no rows", wanted="parquet shards with at least one row", remedy=REMEDY)
    return found


def values_of(table: pa.Table, name: str, *, place: Path, dtype: pa.DataType) -> npt.NDArray[Any]:
    """One column of single values. Raises Fault where it has another type, or nulls."""
    column = table[name]
    if column.type != dtype or column.null_count:
        got = f"column '{name}' of {column.type} with {column.null_count} nulls"
        raise Fault(str(place), got=got, wanted=f"{dtype} without nulls", remedy=REMEDY)
    values: npt.NDArray[Any] = column.to_numpy()
    return values


def fill(into: npt.NDArray[Any], table: pa.Table, *, name: str, place: Path, dtype: pa.DataType) -> None:
    """A column into [R, slots]: single values, or lists from the left. Raises Fault as `values_of`."""
    column = table[name]
    if not pa.types.is_list(column.type):
        into[:, 0] = values_of(table, name, place=place, dtype=dtype)
        return
    lists = pa.concat_arrays(column.chunks)
    lengths = np.diff(np.asarray(lists.offsets))
    if column.type.value_type != dtype or column.null_count or lists.flatten().null_count:
        got = f"column '{name}' of {column.type}, or nulls in it"
        raise Fault(str(place), got=got, wanted=f"lists of {dtype} without nulls", remedy=REMEDY)
    if lengths.max(initial=0) > into.shape[1]:
        got = f"column '{name}' with a list of {lengths.max()}"
        raise Fault(str(place), got=got, wanted=f"at most {into.shape[1]}", remedy=REMEDY)
    into[np.arange(into.shape[1]) < lengths[:, None]] = lists.flatten().to_numpy()


def check_ids(ids: npt.NDArray[np.int64], feature: IdFeature, *, rows: int, place: str) -> None:
    """Raises Fault where an id is no row of its table; -1, no id, may stand in lists."""
    lowest = -1 if feature.dtype == "list<int64>" else 0
    if len(ids) and (int(ids.min()) < lowest or int(ids.max()) >= rows):
        bad = int(ids.min()) if int(ids.min()) < lowest else int(ids.max())
        raise Fault(place, got=f"id {bad}", wanted=f"ids from 0 to {rows - 1}", remedy=REMEDY)
