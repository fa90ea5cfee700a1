"""Raw files -> typed Arrow batches. What is malformed is a fault with its file and rows; nothing is coerced."""

import glob
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from etl.faults import Fault
from etl.pack import ARROW, inner_type, text_keys, typed_column
from etl.schema import GROUP
from etl.spec import Data, FeatureSpec, Task

_BLOCK_BYTES = 16 << 20


def files(patterns: Sequence[str], *, what: str) -> list[Path]:
    """The files that the patterns name, in order. Raises Fault where one names none."""
    found: list[Path] = []
    for pattern in patterns:
        matches = sorted(glob.glob(pattern))
        if not matches:
            remedy = "check the path; relative paths start in the current folder"
            raise Fault(f"data.{what}", got=f"no file '{pattern}'", wanted="an existing file or glob", remedy=remedy)
        found += [Path(match) for match in matches]
    return found


def read_batches(spec: FeatureSpec, paths: Sequence[Path]) -> Iterator[pa.RecordBatch]:
    """Batches of all feature columns, typed and named as in the raw files; a float32 column `label:<task>` a task; and
    an int64 column `group:` where the spec names a group.

    Raises:
        Fault: an unreadable, empty or truncated file, a missing column, a value of the wrong type, a label not 0/1.
    """
    features, separators = spec.raw_columns(), spec.separators()
    for path in paths:
        rows = 0
        for batch in _text_or_typed(spec.data, path, names=_needed(spec)):
            place = f"{path}: rows {rows + 1} to {rows + batch.num_rows}"
            columns = {
                name: _typed(_split(batch[name], separators.get(name)), name=name, dtype=dtype, place=place)
                for name, dtype in features.items()
            }
            if spec.data.group:
                columns[GROUP] = pa.array(text_keys(batch[spec.data.group].cast(pa.large_string())))
            columns |= {f"label:{t.name}": _labels(batch[t.label], task=t, place=place) for t in spec.tasks}
            rows += batch.num_rows
            yield pa.record_batch(columns)
        if not rows:
            raise Fault(str(path), got="no rows", wanted="at least one", remedy="check how the file was made")


def read_raw_split(spec: FeatureSpec, split: str) -> pa.Table:
    """The feature columns of a split's own raw files, in file order, without labels."""
    paths = files(getattr(spec.data, split), what=split)
    table = pa.Table.from_batches(read_batches(spec, paths))
    return table.select(list(spec.raw_columns()))


def read_rows(path: Path, columns: Mapping[str, str]) -> pa.Table:
    """Raw rows to score, from parquet or JSON lines, in file order; absent and unknown columns are the packer's fault.

    Raises:
        Fault: the file is missing, unreadable or of another kind.
    """
    wanted, remedy = "a .parquet or .jsonl file of raw rows", f"give the columns {', '.join(columns)}"
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path)
        if path.suffix in (".jsonl", ".json"):
            schema = pa.schema([(name, arrow_type(dtype)) for name, dtype in columns.items()])
            table = pa_json.read_json(path, parse_options=pa_json.ParseOptions(explicit_schema=schema))
            named = pa_json.read_json(path).column_names  # a schema makes nulls of columns that no line names
            return table.select([name for name in table.column_names if name in named])
    except FileNotFoundError:
        raise Fault(str(path), got="no such file", wanted=wanted, remedy="check the path") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise Fault(str(path), got=str(error), wanted=wanted, remedy=remedy) from None
    raise Fault(str(path), got=f"a '{path.suffix}' file", wanted=wanted, remedy="convert it")


def arrow_type(dtype: str) -> pa.DataType:
    """The Arrow type of a raw column."""
    return pa.list_(ARROW[inner_type(dtype)]) if dtype.startswith("list<") else ARROW[dtype]


def _needed(spec: FeatureSpec) -> list[str]:
    group = [spec.data.group] if spec.data.group else []
    return list(dict.fromkeys([*spec.raw_columns(), *group, *(task.label for task in spec.tasks)]))


def _split(column: pa.Array, separator: str | None) -> pa.Array:
    """Text with several values -> lists; a column that holds lists stays as it is."""
    if separator is None or not pa.types.is_large_string(column.type):
        return column
    return pc.split_pattern(column, separator)


def _text_or_typed(data: Data, path: Path, *, names: list[str]) -> Iterator[pa.RecordBatch]:
    """Parquet columns as they are typed; csv columns as trimmed texts with nulls."""
    try:
        yield from _parquet(path, names=names) if data.format == "parquet" else _csv(data, path, names=names)
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError, EOFError) as error:
        remedy = "check the file, and [data] format, columns and comment"
        wanted = f"a readable {data.format} file with the columns {', '.join(names)}"
        raise Fault(str(path), got=str(error).strip(), wanted=wanted, remedy=remedy) from None


def _parquet(path: Path, *, names: list[str]) -> Iterator[pa.RecordBatch]:
    file = pq.ParquetFile(path)
    if absent := [name for name in names if name not in file.schema_arrow.names]:
        raise pa.ArrowKeyError(f"no column {', '.join(absent)}; it has {', '.join(file.schema_arrow.names)}")
    yield from file.iter_batches(columns=names)


def _csv(data: Data, path: Path, *, names: list[str]) -> Iterator[pa.RecordBatch]:
    def invalid(row: pa_csv.InvalidRow) -> str:
        return "skip" if data.comment and row.text.startswith(data.comment) else "error"

    with pa.input_stream(str(path), compression="detect") as stream:
        reader = pa_csv.open_csv(
            stream,
            pa_csv.ReadOptions(
                block_size=_BLOCK_BYTES, column_names=data.columns or None, skip_rows=_leading(data, path)
            ),
            pa_csv.ParseOptions(delimiter="\t" if data.format == "tsv" else ",", invalid_row_handler=invalid),
            pa_csv.ConvertOptions(
                column_types={name: pa.large_string() for name in names},
                include_columns=names,
                strings_can_be_null=False,
            ),
        )
        for batch in reader:
            yield _clean(data, batch)


def _leading(data: Data, path: Path) -> int:
    """Comment lines before the first row: the reader would take them for the header or for the row's width."""
    count = 0
    with pa.input_stream(str(path), compression="detect") as stream:
        head = stream.read(1 << 16)
    for line in head.splitlines():
        if not data.comment or not line.startswith(data.comment.encode()):
            break
        count += 1
    return count


def _clean(data: Data, batch: pa.RecordBatch) -> pa.RecordBatch:
    nulls = pa.array(data.null_values, pa.large_string())
    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        text = pc.utf8_trim_whitespace(column) if data.trim else column
        columns[name] = pc.if_else(pc.is_in(text, nulls), pa.scalar(None, pa.large_string()), text)
    return pa.record_batch(columns)


def _typed(column: pa.Array, *, name: str, dtype: str, place: str) -> pa.Array:
    """One feature column in its type; NaN of a float column is missing, infinity a fault."""
    try:
        column = _from_text(column, dtype)
        array = typed_column(pa.chunked_array([column]), name=name, dtype=dtype)
    except (pa.ArrowInvalid, ValueError) as error:
        kind = dtype.replace("string", "text").replace("int64", "whole numbers").replace("float64", "numbers")
        remedy = "mend the file, name the text in [data] null_values, or change the feature's type"
        raise Fault(f"{place}, column '{name}'", got=str(error), wanted=kind, remedy=remedy) from None
    if dtype != "float64":
        return array
    if pc.any(pc.is_inf(array)).as_py():
        raise Fault(f"{place}, column '{name}'", got="infinity", wanted="finite numbers", remedy="mend the file")
    return pc.if_else(pc.is_nan(array), pa.scalar(None, pa.float64()), array)


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


def _labels(column: pa.Array, *, task: Task, place: str) -> pa.Array:
    """The label as float32 0 and 1."""
    if task.positive:
        text = column.cast(pa.large_string())
        one, zero = (pc.is_in(text, pa.array(side, pa.large_string())) for side in (task.positive, task.negative))
        known, wanted = pc.or_(one, zero), f"one of {', '.join([*task.positive, *task.negative])}"
    else:
        number = _typed(column.cast(pa.int8()) if pa.types.is_boolean(column.type) else column,
                        name=task.label, dtype="float64", place=place)  # fmt: skip
        one, known = pc.equal(number, 1.0), pc.is_in(number, pa.array([0.0, 1.0]))
        wanted = "0 or 1 (or [[tasks]] positive and negative)"
    if not pc.all(known).as_py():
        bad = pc.index(known, False).as_py()
        got, remedy = f"{column[bad].as_py()!r} as label {bad + 1} of these", "mend the file or the task's texts"
        raise Fault(f"{place}, column '{task.label}'", got=got, wanted=wanted, remedy=remedy)
    return one.cast(pa.float32())
