"""Columns of times: whole numbers, and times and dates in nanoseconds since 1970."""

from datetime import date

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from etl.faults import Fault

WHOLE = "whole numbers"
_A_DAY = {"s": 86_400, "ms": 86_400 * 10**3, "ns": 86_400 * 10**9}
_FIRST, _LAST = ((day - date(1970, 1, 1)).days for day in (date.min, date.max))


def clock(column: pa.Array) -> tuple[str, pa.Array]:
    """The kind of times, and the times as int64. Raises pyarrow's errors on what is no time."""
    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return WHOLE, column.cast(pa.int64())
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        zone = getattr(kind, "tz", None)
        times = column.cast(pa.timestamp("ns", zone)).cast(pa.int64())
        return "times with a zone" if zone else "times without a zone", times
    text = column.cast(pa.large_string())
    for kind_of_text, wanted in (
        (WHOLE, pa.int64()),
        ("times with a zone", pa.timestamp("ns", "UTC")),
    ):
        try:
            return kind_of_text, text.cast(wanted).cast(pa.int64())
        except pa.ArrowInvalid:
            continue
    return "times without a zone", text.cast(pa.timestamp("ns")).cast(pa.int64())


def days_of(times: npt.NDArray[np.int64], *, unit: str, place: str) -> npt.NDArray[np.int32]:
    """Days since 1970. Raises Fault, with `place`, where one lies in no year from 1 to 9999."""
    days = times // _A_DAY[unit]
    if (odd := (days < _FIRST) | (days > _LAST)).any():
        got, remedy = f"{times[np.argmax(odd)]} as a time in {unit}", "mend the file, or split.unit"
        raise Fault(place, got=got, wanted="a day of the years 1 to 9999", remedy=remedy)
    return days.astype(np.int32)
