"""How the training rows use each table: which of its rows nothing looks up, and how much the busiest take.

Every epoch reads every training row once, so this is counted from the id columns after training, not in its loop.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import BaseModel, ConfigDict

from etl.schema import Schema
from recsys.parallel.world import World, sum_over_ranks
from recsys.shards import RowGroup

_BLOCK = 1 << 22  # rows of a table counted at once: 32 MB
_PART = 1 << 20  # of these counts, sorted at once


class TableUse(BaseModel):
    """Of one table: its rows, those that no training row looks up, lookups of an epoch, and the share of these that
    goes to the busiest 1 % of the rows, at least one; None where there are no lookups."""

    model_config = ConfigDict(frozen=True)

    rows: int
    dead: int
    lookups: int
    top_share: float | None


def table_uses(schema: Schema, groups: Sequence[RowGroup], *, world: World) -> dict[str, TableUse]:
    """Counted by all ranks together, each on its share of the row groups; every rank has to call."""
    own = groups[world.rank :: world.size]
    features = {t.name: [f.name for f in schema.features if f.table == t.name] for t in schema.tables}
    memory_R = np.empty(min(_BLOCK, max([0, *(t.rows for t in schema.tables)])), np.int64)
    return {
        table.name: _use(table.rows, features[table.name], groups=own, world=world, memory_R=memory_R)
        for table in schema.tables
    }


def _use(
    rows: int, columns: list[str], *, groups: Sequence[RowGroup], world: World, memory_R: npt.NDArray[np.int64]
) -> TableUse:
    """`memory_R` is that of all counts: beside new memory the last one's might still be there."""
    rows_by_count: Counter[int] = Counter()
    for first in range(0, rows, _BLOCK):
        size = min(_BLOCK, rows - first)
        counts_R = memory_R[:size]
        counts_R.fill(0)
        for ids in _ids(columns, groups):
            np.add.at(counts_R, ids[(ids >= first) & (ids < first + size)] - first, 1)
        summed_R = torch.from_numpy(counts_R).to(world.device)
        sum_over_ranks(summed_R)
        for part_R in torch.split(summed_R.cpu(), _PART):
            values, numbers = np.unique(part_R.numpy(), return_counts=True)
            rows_by_count.update(dict(zip(values.tolist(), numbers.tolist(), strict=True)))
    lookups = sum(count * number for count, number in rows_by_count.items())
    top = _top(rows_by_count, -(-rows // 100))
    share = top / lookups if lookups else None
    return TableUse(rows=rows, dead=rows_by_count[0], lookups=lookups, top_share=share)


def _ids(columns: list[str], groups: Sequence[RowGroup]) -> Iterator[npt.NDArray[np.int64]]:
    """The ids of these columns, a row group at a time."""
    for path, of_file in groupby(groups, key=lambda group: group.file):
        file = pq.ParquetFile(path)
        for group in of_file:
            table = file.read_row_group(group.index, columns=columns, use_threads=False)
            for chunk in (chunk for column in table.columns for chunk in column.chunks):
                yield np.from_dlpack(chunk.flatten() if pa.types.is_list(chunk.type) else chunk)


def _top(rows_by_count: Counter[int], wanted: int) -> int:
    """Lookups of the `wanted` busiest rows."""
    found = 0
    for count, number in sorted(rows_by_count.items(), reverse=True):
        taken = min(number, wanted)
        found, wanted = found + count * taken, wanted - taken
    return found
