"""The feature spec: what an experiment file says about raw data, features, labels and splits."""

from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from etl.artifact import digest
from etl.data_spec import Data
from etl.numeric import Count as Count
from etl.numeric import Numeric as Numeric
from etl.numeric import Target as Target
from etl.section import ColumnNames as ColumnNames
from etl.section import IdSection
from etl.section import Name as Name
from etl.section import Section as Section
from etl.section import expanded as expanded

DType = Literal["string", "int64", "float64", "list<string>", "list<int64>", "list<float64>"]
_INNER: dict[DType, DType] = {"list<string>": "string", "list<int64>": "int64", "list<float64>": "float64"}


class _Looked(IdSection):
    """What features with a vocabulary or a hash share. Features with one `table` share its rows and its settings."""

    name: Name | None = Field(None, description="defaults to the column's name")
    column: str | None = Field(None, description="the raw column; defaults to the name")
    table: Name | None = Field(None, description="several features may share one; defaults to the name")
    dtype: Literal["string", "int64"] = Field("string", description="int64 reads whole numbers as categories")
    min_count: int = Field(1, ge=1, description="values seen less often in training go to row 0")
    max_rows: int | None = Field(None, ge=2, description="keep the most frequent values, row 0 included")
    hash_rows: int | None = Field(None, ge=2, description="no vocabulary: hash into this many rows, row 0 included")

    @property
    def rules(self) -> tuple[object, ...]:
        """What features that share a table have to agree on."""
        return self.dtype, self.min_count, self.max_rows, self.hash_rows, self.linear_only, self.dim


class Categorical(_Looked):
    """A string or integer id looked up in a vocabulary fitted on the training rows, or hashed."""

    type: Literal["categorical"]
    columns: list[ColumnNames] = Field(
        [], description="several columns, ranges (C1..C26) or globs (C*), each a feature of its own"
    )


class _Listed(_Looked):
    """Several ids a row: a list column, or in text files values parted by `separator`."""

    max_length: int = Field(ge=1, le=1024, description="ids of a row")
    separator: str = Field("|", min_length=1, description="csv and tsv: what parts the values")
    combiner: Literal["sum", "mean"] = Field("sum", description="how the vectors of a row become one")


class Bag(_Listed):
    """A set of ids, each with a weight where a weight column is given. A longer one than `max_length` is a fault."""

    type: Literal["bag"]
    weight_column: str | None = Field(None, description="a list of numbers, one an id, that multiply the rows")


class Sequence(_Listed):
    """Ids in the order of time, oldest first; of a longer one than `max_length` the newest are kept."""

    type: Literal["sequence"]
    combiner: Literal["sum", "mean"] = Field("mean", description="for models that pool the sequence")


class Cross(IdSection):
    """The combination of two or more id features, hashed into its own table."""

    type: Literal["cross"]
    name: Name
    inputs: list[Name] = Field(min_length=2, description="names of categorical or bucket features")
    hash_rows: int = Field(ge=2, description="rows of the table, row 0 (a part is missing) included")


Resolved = Categorical | Bag | Sequence | Numeric | Cross | Target | Count
Feature = Annotated[Resolved, Field(discriminator="type")]


class Task(Section):
    """A binary label."""

    name: Name
    column: str | None = Field(None, description="the raw column; defaults to the name")
    positive: list[str] = Field([], description="texts that mean 1; empty: the column holds 0 and 1")
    negative: list[str] = Field([], description="texts that mean 0")
    weight: float = Field(1.0, ge=0, description="factor of this task's loss")
    given: Name | None = Field(None, description="rows count for this task only where that other task's label is 1")
    implies: Name | None = Field(None, description="a 1 here where that other task has a 0 is a fault in the data")

    @model_validator(mode="after")
    def _both_sides(self) -> "Task":
        if bool(self.positive) != bool(self.negative):
            raise ValueError("'positive' and 'negative' go together: any other text is a fault in the data")
        if set(self.positive) & set(self.negative):
            raise ValueError("a text stands in both 'positive' and 'negative'")
        return self

    @property
    def label(self) -> str:
        """The raw column that holds the label."""
        return self.column or self.name


class Etl(Section):
    """How the job runs."""

    engine: Literal["polars", "nvtabular"] = Field(
        "polars", description="polars: streaming on CPU; nvtabular: on pandas or cuDF, also on several machines"
    )
    device: Literal["cpu", "cuda"] = Field("cpu", exclude=True, description="cuda: cudf-polars, or cuDF for nvtabular")
    scheduler: str | None = Field(
        None, exclude=True, pattern=r"^\w+://", description="nvtabular: address of a Dask scheduler, tcp://host:8786"
    )
    rows_per_shard: int = Field(1_000_000, ge=1, description="rows of one parquet shard")
    rows_per_group: int = Field(65_536, ge=1, description="rows of one parquet row group, the unit of reading")

    @model_validator(mode="after")
    def _one_engine(self) -> "Etl":
        if self.engine != "nvtabular" and self.scheduler:
            raise ValueError("'scheduler' belongs to engine = 'nvtabular'")
        return self


class FeatureSpec(Section):
    """The sections of an experiment file that decide what a dataset folder holds."""

    data: Data
    features: list[Feature] = Field(min_length=1)
    tasks: list[Task] = Field(min_length=1)
    etl: Etl = Field(default_factory=Etl)

    @model_validator(mode="after")
    def _names(self) -> "FeatureSpec":
        resolved = list(resolve(self.features))
        names = [str(feature.name) for feature in resolved] + [task.name for task in self.tasks]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"features and tasks need names of their own; named twice: {', '.join(repeated)}")
        for task in self.tasks:
            others = {other.name for other in self.tasks} - {task.name}
            for key, named in (("given", task.given), ("implies", task.implies)):
                if named is not None and named not in others:
                    raise ValueError(f"task '{task.name}': {key} = '{named}' is no other task")
        ids: set[str] = set()
        for feature in resolved:
            if isinstance(feature, Categorical) or (isinstance(feature, Numeric) and feature.as_ == "buckets"):
                ids.add(str(feature.name))
            elif isinstance(feature, Cross) and (unknown := sorted(set(feature.inputs) - ids)):
                wanted = "categorical or bucket features that are listed before it"
                raise ValueError(f"cross '{feature.name}': inputs must be {wanted}, not {unknown}")
        if leaks := set(raw := self.raw_columns()) & {task.label for task in self.tasks}:
            raise ValueError(f"no feature that reads the column '{min(leaks)}', which is a label")
        self.data.check(raw, tasks=[task.name for task in self.tasks])
        self.file_columns()
        self.shared_tables()
        self.slots()
        return self

    def data_hash(self) -> str:
        """What a dataset folder is made from: the hash of the sections that the ETL reads."""
        sections = self.model_dump(mode="json", by_alias=True, include=set(FeatureSpec.model_fields))
        for feature in sections["features"]:
            feature.pop("dim", None)  # training's alone
        return digest(sections)

    def raw_columns(self) -> dict[str, DType]:
        """Raw feature columns, as a request holds them, with the type in which they are read, by first use."""
        types = _agreed(self._uses())
        for feature in self.encodings():
            for column in feature.by:
                known = types.get(column)
                wanted = known if known in ("string", "int64") else feature.dtype
                types = _agreed([*types.items(), (column, wanted)])
        return types

    def file_columns(self) -> dict[str, DType]:
        """What the files have to hold of these: the collected columns instead of histories."""
        sources = self.data.history_sources
        return _agreed(
            (sources[name], _INNER[dtype]) if name in sources else (name, dtype)
            for name, dtype in self.raw_columns().items()
        )

    def encodings(self) -> list[Target | Count]:
        """The features that stand for what the training rows say about a value; the task of each target is set."""
        tasks = [task.name for task in self.tasks]
        found: list[Target | Count] = []
        for feature in resolve(self.features):
            if isinstance(feature, Target):
                named = feature.task or (tasks[0] if len(tasks) == 1 else None)
                if named not in tasks:
                    raise ValueError(f"target '{feature.name}': task must be one of {', '.join(tasks)}")
                found.append(feature.model_copy(update={"task": named}))
            elif isinstance(feature, Count):
                found.append(feature)
        return found

    def _uses(self) -> Iterator[tuple[str, DType]]:
        for feature in resolve(self.features):
            if isinstance(feature, Bag | Sequence):
                yield column_of(feature), "list<string>" if feature.dtype == "string" else "list<int64>"
                if isinstance(feature, Bag) and feature.weight_column:
                    yield feature.weight_column, "list<float64>"
            elif not isinstance(feature, Cross | Target | Count):
                yield column_of(feature), feature.dtype if isinstance(feature, Categorical) else "float64"

    def slots(self) -> dict[str, int]:
        """The longest list of each list column that a packed row has room for."""
        found: dict[str, int] = {}
        for column, feature in self._list_columns():
            if found.setdefault(column, feature.max_length) != feature.max_length:
                raise ValueError(f"column '{column}' is read with two values of max_length")
        return found

    def separators(self) -> dict[str, str]:
        """What parts the values of each list column in text files; weights are parted as their ids."""
        return {column: feature.separator for column, feature in self._list_columns()}

    def _list_columns(self) -> Iterator[tuple[str, Bag | Sequence]]:
        """Each raw column of ids or weights, with the feature that reads it."""
        for feature in resolve(self.features):
            if isinstance(feature, Bag | Sequence):
                yield column_of(feature), feature
                if isinstance(feature, Bag) and feature.weight_column:
                    yield feature.weight_column, feature

    def shared_tables(self) -> dict[str, list[Categorical | Bag | Sequence]]:
        """Features by table, of those that have a vocabulary or a hash."""
        tables: dict[str, list[Categorical | Bag | Sequence]] = {}
        for feature in resolve(self.features):
            if isinstance(feature, Categorical | Bag | Sequence):
                tables.setdefault(table_of(feature), []).append(feature)
        for table, users in tables.items():
            if len({user.rules for user in users}) > 1:
                names = ", ".join(str(user.name) for user in users)
                keys = "dtype, min_count, max_rows, hash_rows, linear_only and dim"
                raise ValueError(f"features {names} share the table '{table}' and have to agree on {keys}")
        others = [str(f.name) for f in resolve(self.features) if isinstance(f, Cross | Numeric)]
        if taken := sorted(set(tables) & set(others)):
            raise ValueError(f"table '{taken[0]}' has the name of another feature's own table")
        return tables


def _agreed(uses: Iterable[tuple[str, DType]]) -> dict[str, DType]:
    """One type a column. Raises ValueError where two uses of a column do not agree."""
    types: dict[str, DType] = {}
    for column, wanted in uses:
        pair = {types.setdefault(column, wanted), wanted}
        if pair == {"int64", "float64"}:
            types[column] = "int64"
        elif len(pair) > 1:
            raise ValueError(f"column '{column}' is read as {' and as '.join(sorted(pair))}: set dtype = 'int64'")
    return types


def resolve(features: list[Feature]) -> Iterator[Resolved]:
    """Blocks that name several columns become one feature a column; every name is set."""
    for index, feature in enumerate(features):
        if isinstance(feature, Cross | Target | Count):
            yield feature
        elif columns := getattr(feature, "columns", []):
            if feature.name or feature.column:
                raise ValueError(f"features.{index}: 'columns' excludes 'name' and 'column'")
            for column in expanded(columns):
                yield feature.model_copy(update={"name": column, "column": column, "columns": []})
        elif name := feature.name or feature.column:
            yield feature.model_copy(update={"name": name, "column": feature.column or name})
        else:
            raise ValueError(f"features.{index}: needs 'name', 'column' or 'columns'")


def dims_of(features: list[Feature]) -> dict[str, int]:
    """Floats of a vector that are learnt, by table, of the features that say it."""
    found: dict[str, int] = {}
    for feature in resolve(features):
        if not isinstance(feature, Target | Count) and feature.dim:
            shared = isinstance(feature, Categorical | Bag | Sequence) and feature.table
            found[shared or str(feature.name)] = feature.dim
    return found


def column_of(feature: Categorical | Bag | Sequence | Numeric) -> str:
    """The raw column of a resolved feature."""
    return feature.column or feature.name or ""


def table_of(feature: Categorical | Bag | Sequence) -> str:
    """The table of a resolved feature."""
    return feature.table or feature.name or ""
