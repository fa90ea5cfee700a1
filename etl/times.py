"""Columns of times: whole numbers, and times and dates in nanoseconds since 1970."""

import pyarrow as pa

WHOLE = "whole numbers"


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
