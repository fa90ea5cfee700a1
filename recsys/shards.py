"""Parquet shards of one split: their row groups, and what they hold as arrays."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from etl.faults import Fault
from etl.schema import GROUP, WEIGHT, IdFeature, Schema

REMEDY = "run 'python -m etl run' again"
Int64s = npt.NDArray[np.int64]
_INT32_ROWS = 1 << 31


@dataclass(frozen=True)
class RowGroup:
    """The unit of reading."""

    file: Path
    index: int
    rows: int
    first: int
    """The number of its first row, counted in file order over all files of the split."""


class Target(NamedTuple):
    """A column of the files, where its values belong [R, slots], whether it may have lists, and whose ids these are."""

    name: str
    into_RL: npt.NDArray[Any]
    lists: bool = False
    ids_of: IdFeature | None = None


class Rows(NamedTuple):
    """Rows in memory: ids [R, S], floats float32 [R, N], labels float32 [R, T], groups int64 [R, 1 or 0],
    weights float32 [R, 1 or 0].

    Ids of a batch are int64 and lie feature after feature, as lookups want them; those that are taken from lie row by
    row, and are int32 where no table has more rows.
    `numbers_R` int64 counts the rows of the split in file order.
    """

    ids_RS: npt.NDArray[np.int32] | Int64s
    floats_RN: npt.NDArray[np.float32]
    labels_RT: npt.NDArray[np.float32]
    groups_RG: Int64s
    weights_RW: npt.NDArray[np.float32]
    numbers_R: Int64s

    @classmethod
    def empty(cls, schema: Schema, rows: int) -> "Rows":
        """Rows to be filled: no ids and values of 0 so far, labels and the like not set."""
        small = all(table.rows <= _INT32_ROWS for table in schema.tables)
        shape = rows, schema.slot_ends[-1] if schema.features else 0
        return cls(
            np.full(shape, -1, np.int32) if small else np.full(shape, -1, np.int64),
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

    def targets(self, schema: Schema) -> Iterator[Target]:
        """Which columns of a file these rows are made of."""
        end = len(schema.dense)
        for at, name in enumerate(schema.dense_names):
            yield Target(name, self.floats_RN[:, at : at + 1])
        for feature, stop in zip(schema.features, schema.slot_ends, strict=True):
            yield Target(feature.name, self.ids_RS[:, stop - feature.slots : stop], lists=True, ids_of=feature)
            if feature.weighted:
                start, end = end, end + feature.slots
                yield Target(f"{feature.name}:value", self.floats_RN[:, start:end], lists=True)
        for at, name in enumerate(schema.task_names):
            yield Target(name, self.labels_RT[:, at : at + 1])
        if schema.group:
            yield Target(GROUP, self.groups_RG)
        if schema.weight:
            yield Target(WEIGHT, self.weights_RW)

    def part(self, start: int, stop: int) -> "Rows":
        """Neighbouring rows, where they are."""
        return Rows._make(part[start:stop] for part in self)

    def take(self, which_B: Int64s) -> "Rows":
        """A copy of some of the rows, as batches have them."""
        taken = Rows._make(part.take(which_B, axis=0) for part in self)
        return taken._replace(ids_RS=taken.ids_RS.astype(np.int64, order="F"))


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


def fill(target: Target, column: pa.ChunkedArray, *, place: Path) -> npt.NDArray[Any]:
    """Single values, or lists from the left: int64 into whole numbers of any size, else float32.

    Returns the values as they are in the file, which the caller has to check where they are ids.

    Raises:
        Fault: another type, nulls, or too long a list.
    """
    name, into_RL = target.name, target.into_RL
    dtype, lists = pa.int64() if into_RL.dtype.kind == "i" else pa.float32(), pa.types.is_list(column.type)
    whole = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
    flat = whole.flatten() if lists else whole
    nulls = column.null_count + (flat.null_count if lists else 0)
    if flat.type != dtype or nulls or (lists and not target.lists):
        got = f"column '{name}' of {column.type} with {nulls} nulls"
        wanted = f"{dtype}{', or lists of it,' if target.lists else ''} without nulls"
        raise Fault(str(place), got=got, wanted=wanted, remedy=REMEDY)
    values: npt.NDArray[Any] = np.from_dlpack(flat)  # to_numpy would load pandas: 40 MB
    if not lists:
        into_RL[:, 0] = values
        return values
    lengths = np.diff(np.from_dlpack(whole.offsets))
    if lengths.max(initial=0) > into_RL.shape[1]:
        got = f"column '{name}' with a list of {lengths.max()}"
        raise Fault(str(place), got=got, wanted=f"at most {into_RL.shape[1]}", remedy=REMEDY)
    into_RL[np.arange(into_RL.shape[1]) < lengths[:, None]] = values
    return values


def check_ids(ids: Int64s, feature: IdFeature, *, rows: int, place: str) -> None:
    """Raises Fault where an id is no row of its table; -1, no id, may stand in lists."""
    lowest = -1 if feature.dtype == "list<int64>" else 0
    if len(ids) and (int(ids.min()) < lowest or int(ids.max()) >= rows):
        bad = int(ids.min()) if int(ids.min()) < lowest else int(ids.max())
        raise Fault(place, got=f"id {bad}", wanted=f"ids from 0 to {rows - 1}", remedy=REMEDY)
