"""Raw rows as later stages ask for them: those of a split, and rows to score."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from etl.faults import Fault
from etl.formats import files
from etl.pack import ARROW, inner_type
from etl.reader import Reader
from etl.spec import FeatureSpec
from etl.stage import stage


def read_raw_split(spec: FeatureSpec, split: str) -> pa.Table:
    """The feature columns of a split's raw rows, without labels, in the order of the dataset folder.

    Rows that come from the training files, from histories or from draws are made again, beside the other splits.

    Raises:
        Fault: as the ETL; the raw files have to be there.
    """
    names, data = list(spec.raw_columns()), spec.data
    if getattr(data, split) and not data.histories and not data.negatives and not (split == "train" and data.divided):
        batches = list(Reader(spec).batches(files(getattr(data, split), what=split)))
        if batches:
            return pa.Table.from_batches(batches).select(names)
    with tempfile.TemporaryDirectory() as folder:
        stage(spec, Path(folder), report=_nobody)
        return pq.read_table(Path(folder) / f"{split}.parquet", memory_map=False).select(names)


def _nobody(stage: str, rows: int, /, *, total: int | None = None) -> None:
    """Rows that are read a second time are not reported."""


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
