"""List columns with what a user did before, from the event log of all splits."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from etl.data_spec import History
from etl.origin import ROW
from etl.transform import MISSING_KEY, Int64s


class HistoryLog:
    """One history over the staged rows, which number all rows of the log in `row:` from 0 without a gap.

    Holds in memory the collected columns of the events and two positions a row; while it is made also user and time.
    """

    def __init__(self, history: History, at: int, *, staged: Sequence[Path], dtypes: dict[str, pa.DataType]) -> None:
        self.min_length = history.min_length
        self._dtypes = {name: dtypes[name] for name in history.columns}
        names = {"user": f"history:{at}:user", "time": f"history:{at}:time", "event": f"history:{at}:event", "row": ROW}
        log = pl.scan_parquet(list(staged)).select(pl.col(name).alias(key) for key, name in names.items()).collect()
        order = log.select(pl.arg_sort_by("user", "time", "row")).to_series().to_numpy()
        columns = {key: log[key].to_numpy()[order] for key in names}
        self._first, self._end = _ranges(columns, longest=history.max_length)
        events = pa.array(order[columns["event"]].astype(np.int64))
        collected = list(dict.fromkeys(history.columns.values()))
        sources = pa.concat_tables([pq.read_table(path, columns=collected) for path in staged])
        self._values = {
            name: pa.concat_arrays(sources[source].chunks).take(events) for name, source in history.columns.items()
        }

    def lengths(self, rows: Int64s) -> Int64s:
        """Events before each of the rows, at most the longest history."""
        return self._end[rows] - self._first[rows]

    def columns(self, rows: Int64s) -> dict[str, pa.Array]:
        """The list columns of these rows, oldest event first."""
        lengths = self.lengths(rows)
        ends = np.cumsum(lengths)
        at = pa.array(np.repeat(self._first[rows] - (ends - lengths), lengths) + np.arange(lengths.sum()))
        offsets = pa.array(np.concatenate([[0], ends]), pa.int64())
        return {
            name: pa.LargeListArray.from_arrays(offsets, values.take(at)).cast(self._dtypes[name])
            for name, values in self._values.items()
        }


def _ranges(columns: dict[str, Int64s], *, longest: int) -> tuple[Int64s, Int64s]:
    """For each row, by its number, which of the events in the order of user and time are its history: first and end.

    All events of a user with an earlier time stand between the user's first event and the first row of equal time.
    """
    user, time, row = columns["user"], columns["time"], columns["row"]
    place = np.arange(len(row))
    other_user = np.diff(user, prepend=user[:1]) != 0
    other_time = other_user | (np.diff(time, prepend=time[:1]) != 0)
    user_from, time_from = (np.maximum.accumulate(np.where(new, place, 0)) for new in (other_user, other_time))
    before = np.cumsum(columns["event"]) - columns["event"]  # events in the rows before
    first, end = np.empty(len(row), np.int64), np.empty(len(row), np.int64)
    end[row] = before[time_from]
    first[row] = np.maximum(before[user_from], before[time_from] - longest)
    nobody = row[user == MISSING_KEY]
    first[nobody] = end[nobody]
    return first, end
