"""The schema: what a dataset folder holds. Written once by the ETL, copied and compared by all later stages."""

import json
from itertools import accumulate
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from etl.artifact import read_json, write_json
from etl.faults import Fault

GROUP, WEIGHT = "group:", "weight:"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class IdFeature(_Record):
    """Ids of one feature: rows of `table`, 0 = missing or unseen.

    A feature with one slot is an int64 column of the shards; one with several (a bag, a sequence) a list<int64> column
    of at most `slots` ids, oldest first, in memory padded with -1. `weighted` features have a float32 column (or list)
    `<name>:value` beside it, which multiplies the rows. `combiner` says how a row's several vectors become one; `mean`
    divides by the sum of the values.
    """

    name: str
    type: Literal["categorical", "buckets", "cross", "field", "bag", "sequence"]
    table: str
    linear_only: bool
    slots: int = 1
    weighted: bool = False
    combiner: Literal["sum", "mean"] = "sum"
    dtype: Literal["int64", "list<int64>"] = "int64"


class DenseFeature(_Record):
    """One float32 column of the shards, without missing values."""

    name: str
    dtype: Literal["float32"] = "float32"


class Table(_Record):
    """An embedding table; ids run from 0 to rows - 1."""

    name: str
    rows: int


class TaskColumn(_Record):
    """A label column: float32, 0 or 1. `positive_rate` is that of the training rows.

    `weight` multiplies the task's loss; with `given`, rows count for it only where that other task's label is 1.
    """

    name: str
    positive_rate: float
    weight: float = 1.0
    given: str | None = None
    dtype: Literal["float32"] = "float32"


class Schema(_Record):
    """The one contract between the ETL, training and serving.

    `group`: shards have an int64 column `group:`. `weight`: a float32 column `weight:`, how often a row counts.
    """

    version: Literal[1] = 1
    features: tuple[IdFeature, ...]
    dense: tuple[DenseFeature, ...]
    tables: tuple[Table, ...]
    tasks: tuple[TaskColumn, ...]
    group: bool = False
    weight: bool = False

    def rows(self, table: str) -> int:
        """Rows of one table."""
        return next(t.rows for t in self.tables if t.name == table)

    @property
    def id_names(self) -> list[str]:
        """Id columns in the order in which they are stored, packed and served."""
        return [feature.name for feature in self.features]

    @property
    def dense_names(self) -> list[str]:
        """Dense columns in the order in which they are stored, packed and served."""
        return [feature.name for feature in self.dense]

    @property
    def task_names(self) -> list[str]:
        """Label columns; predictions come in this order."""
        return [task.name for task in self.tasks]

    @property
    def slot_names(self) -> list[str]:
        """Columns of `ids_BS`: the feature of each slot."""
        return [feature.name for feature in self.features for _ in range(feature.slots)]

    @property
    def slot_ends(self) -> list[int]:
        """For each id feature the end of its columns in `ids_BS`, which start where the one before ends."""
        return list(accumulate(feature.slots for feature in self.features))

    @property
    def float_names(self) -> list[str]:
        """Columns of `floats_BN`: the dense inputs, then the values of each weighted feature's slots."""
        weighted = [feature for feature in self.features if feature.weighted]
        return self.dense_names + [f"{f.name}:value" for f in weighted for _ in range(f.slots)]

    def write(self, folder: Path) -> None:
        """Writes `schema.json` into an artifact's folder."""
        write_json(folder / "schema.json", self.model_dump(mode="json"))


def read_schema(folder: Path) -> Schema:
    """The schema of a dataset, run or bundle folder.

    Raises:
        Fault: it is missing, broken, or of another version.
    """
    path = folder / "schema.json"
    raw = read_json(path, remedy="run the stage that makes this folder again")
    if raw.get("version") != 1:
        raise Fault(str(path), got=f"version {raw.get('version')}", wanted="version 1", remedy="make the folder anew")
    return Schema.model_validate_json(json.dumps(raw))
