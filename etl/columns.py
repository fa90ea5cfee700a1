"""One raw column of a batch in the type that the spec says; what is malformed is a fault with its file and rows."""

import pyarrow as pa
import pyarrow.compute as pc

from etl.faults import Fault
from etl.pack import ARROW, inner_type, typed_column, without_nan
from etl.spec import Task
from etl.transform import RESERVED_KEYS


def typed(column: pa.Array, *, name: str, dtype: str, place: str) -> pa.Array:
    """One feature column in its type; NaN of a float column is missing, infinity a fault."""
    try:
        column = _from_text(column, dtype)
        array = typed_column(pa.chunked_array([column]), name=name, dtype=dtype)
    except (pa.ArrowInvalid, ValueError) as error:
        kind = dtype.replace("string", "text").replace("int64", "whole numbers").replace("float64", "numbers")
        remedy = "mend the file, name the text in [data] null_values, or change the feature's type"
        raise Fault(f"{place}, column '{name}'", got=str(error), wanted=kind, remedy=remedy) from None
    if inner_type(dtype) == "int64":
        lowest = pc.min(array if dtype == "int64" else array.values).as_py()
        if lowest in RESERVED_KEYS:
            got, remedy = f"{lowest}, which stands for missing", "leave the value empty"
            raise Fault(f"{place}, column '{name}'", got=got, wanted="whole numbers above that", remedy=remedy)
    if dtype != "float64" or pc.all(pc.is_finite(array), min_count=0).as_py():
        return array
    if pc.any(pc.is_inf(array)).as_py():
        raise Fault(f"{place}, column '{name}'", got="infinity", wanted="finite numbers", remedy="mend the file")
    return without_nan(array)


def labels_of(column: pa.Array, *, task: Task, place: str) -> pa.Array:
    """The label as float32 0 and 1."""
    if task.positive:
        text = column.cast(pa.large_string())
        one, zero = (pc.is_in(text, pa.array(side, pa.large_string())) for side in (task.positive, task.negative))
        known, wanted = pc.or_(one, zero), f"one of {', '.join([*task.positive, *task.negative])}"
    else:
        number = typed(column.cast(pa.int8()) if pa.types.is_boolean(column.type) else column,
                        name=task.label, dtype="float64", place=place)  # fmt: skip
        one = pc.equal(number, 1.0)
        known = pc.or_(one, pc.equal(number, 0.0)).fill_null(False)
        wanted = "0 or 1 (or [[tasks]] positive and negative)"
    if not pc.all(known).as_py():
        bad = pc.index(known, False).as_py()
        got, remedy = f"{column[bad].as_py()!r} as label {bad + 1} of these", "mend the file or the task's texts"
        raise Fault(f"{place}, column '{task.label}'", got=got, wanted=wanted, remedy=remedy)
    return one.cast(pa.float32())


def weights_of(column: pa.Array, *, name: str, place: str) -> pa.Array:
    """How often each row counts, float32. Raises Fault on what is missing, negative, or infinite as float32."""
    weights = typed(column, name=name, dtype="float64", place=place).cast(pa.float32(), safe=False)
    sound = pc.and_(pc.greater_equal(weights, 0.0), pc.is_finite(weights)).fill_null(False)
    if not pc.all(sound, min_count=0).as_py():
        bad = pc.index(sound, False).as_py()
        got, remedy = f"{column[bad].as_py()!r} as weight {bad + 1} of these", "mend the file, or drop data.weight"
        raise Fault(f"{place}, column '{name}'", got=got, wanted="a number from 0 on in each row", remedy=remedy)
    return weights


def _from_text(column: pa.Array, dtype: str) -> pa.Array:
    """Numbers that a text file holds as texts, also within lists."""
    kind, inner = column.type, inner_type(dtype)
    if inner == "string":
        return column
    if pa.types.is_large_string(kind):
        return column.cast(ARROW[inner])
    if pa.types.is_list(kind) and pa.types.is_large_string(kind.value_type):
        return column.cast(pa.list_(ARROW[inner]))
    return column
