"""Which columns NVTabular reads and writes for a feature spec. They have names of their own, short and plain."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from etl.faults import Fault
from etl.spec import Bag, Categorical, Cross, FeatureSpec, Numeric, Sequence, column_of, resolve, table_of

Looked = Categorical | Bag | Sequence

_LONGEST_FILE_NAME = 200


@dataclass(frozen=True)
class KeyColumn:
    """64-bit keys of a raw column as one table's values; a list ends with a mark, so that it is never empty."""

    name: str
    raw: str
    table: str
    listed: bool


@dataclass(frozen=True)
class Hash:
    """A feature without a vocabulary: its key columns, several of a cross, and the rows of its table.

    A cross of buckets has the buckets' own column among its inputs.
    """

    name: str
    inputs: tuple[str, ...]
    rows: int
    crossed: bool


@dataclass
class Plan:
    """The columns of one feature spec. `of` maps each feature's name to the column that holds its ids or numbers."""

    keys: dict[tuple[str, str], KeyColumn] = field(default_factory=dict)
    numbers: dict[str, Numeric] = field(default_factory=dict)
    hashes: list[Hash] = field(default_factory=list)
    tables: dict[str, tuple[str, ...]] = field(default_factory=dict)
    of: dict[str, str] = field(default_factory=dict)

    @property
    def vocabulary_columns(self) -> dict[str, KeyColumn]:
        """Key columns that are looked up in a vocabulary."""
        names = {name for columns in self.tables.values() for name in columns}
        return {key.name: key for key in self.keys.values() if key.name in names}

    def numeric(self, *kinds: str) -> dict[str, Numeric]:
        """Number columns of features that are dense, fields or buckets."""
        return {name: feature for name, feature in self.numbers.items() if feature.as_ in kinds}


def plan(spec: FeatureSpec) -> Plan:
    """Plans the columns.

    Raises:
        Fault: nothing for NVTabular to do, or more columns on one table than it can name.
    """
    made, features = Plan(), graphed(spec)
    if not features:
        raise refused("features", what="target and count encodings alone")
    for feature in features:
        if isinstance(feature, Looked):
            key = (table_of(feature), column_of(feature))
            made.keys.setdefault(key, _key_column(feature, at=len(made.keys)))
    for at, feature in enumerate(features):
        made.of[str(feature.name)] = _output(feature, at=at, made=made)
    made.hashes += _hashes(features, made)
    for table, users in spec.shared_tables().items():
        if not users[0].hash_rows:
            made.tables[table] = tuple(dict.fromkeys(made.keys[table, column_of(user)].name for user in users))
            if len("_".join(made.tables[table])) > _LONGEST_FILE_NAME:
                raise refused(f"features: table '{table}'", what=f"{len(made.tables[table])} columns on one table")
    return made


def refused(place: str, *, what: str) -> Fault:
    """What the NVTabular engine can't do, or would do wrong."""
    return Fault(place, got=f"{what} with engine 'nvtabular'", wanted="engine 'polars'", remedy='set engine = "polars"')


def graphed(spec: FeatureSpec) -> list[Looked | Numeric | Cross]:
    """The features that the Workflow makes, resolved: all but target and count encodings."""
    return [feature for feature in resolve(spec.features) if isinstance(feature, Looked | Numeric | Cross)]


def _key_column(feature: Looked, *, at: int) -> KeyColumn:
    listed = isinstance(feature, Bag | Sequence)
    return KeyColumn(f"c{at}", raw=column_of(feature), table=table_of(feature), listed=listed)


def _output(feature: Looked | Numeric | Cross, *, at: int, made: Plan) -> str:
    """The column of one feature's result; numbers are noted on the way."""
    if isinstance(feature, Numeric):
        name = f"{'b' if feature.as_ == 'buckets' else 'n'}{at}"
        made.numbers[name] = feature
        return name
    if isinstance(feature, Cross) or feature.hash_rows:
        return f"h{at}"
    return made.keys[table_of(feature), column_of(feature)].name


def _hashes(features: list[Looked | Numeric | Cross], made: Plan) -> Iterator[Hash]:
    looked = {f.name: made.keys[table_of(f), column_of(f)].name for f in features if isinstance(f, Looked)}
    for feature in features:
        name = made.of[str(feature.name)]
        if isinstance(feature, Cross):
            inputs = tuple(looked.get(part) or made.of[part] for part in feature.inputs)
            yield Hash(name, inputs=inputs, rows=feature.hash_rows, crossed=True)
        elif isinstance(feature, Looked) and feature.hash_rows:
            yield Hash(name, inputs=(looked[feature.name],), rows=feature.hash_rows, crossed=False)
