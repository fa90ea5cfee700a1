"""What a dataset folder has to hold, in plain Python: one value at a time, no arrays, no engine, no transform."""

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from etl.spec import (
    Bag,
    Categorical,
    Count,
    Cross,
    FeatureSpec,
    Numeric,
    Sequence,
    Target,
    column_of,
    resolve,
    table_of,
)

Columns = Mapping[str, list[Any]]
Key = int | None
"""A value's 64-bit key as an unsigned number; None is missing."""

_ALL = 2**64


@dataclass
class Expected:
    """Vocabularies by table, and by split and feature: ids, numbers, and counts of missing and unseen values.

    `nulls` counts what is missing of dense inputs.

    `loose` names inputs whose numbers lie so close together that a deviation of them means little.
    """

    vocabularies: dict[str, list[tuple[Any, int]]] = field(default_factory=dict)
    ids: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    numbers: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    missing: dict[str, dict[str, int]] = field(default_factory=dict)
    nulls: dict[str, dict[str, int]] = field(default_factory=dict)
    unseen: dict[str, dict[str, int]] = field(default_factory=dict)
    loose: set[str] = field(default_factory=set)


def expected(spec: FeatureSpec, splits: Mapping[str, Columns]) -> Expected:
    """Fits on splits["train"] and encodes all splits."""
    found = Expected()
    for table, users in spec.shared_tables().items():
        if not users[0].hash_rows:
            columns = dict.fromkeys(column_of(user) for user in users)
            found.vocabularies[table] = _vocabulary(users[0], columns, splits["train"])
    features = {str(feature.name): feature for feature in resolve(spec.features)}
    fitted = _Fitted(features, found.vocabularies)
    for name, feature in features.items():
        if isinstance(feature, Numeric):
            fitted.steps[name] = _fit(feature, splits["train"][column_of(feature)])
    found.loose = {name for name, step in fitted.steps.items() if isinstance(step, _Scale) and step.loose}
    for split, columns in splits.items():
        found.ids[split], found.numbers[split], found.missing[split], found.unseen[split] = {}, {}, {}, {}
        found.nulls[split] = dict(_nulls(features, columns))
        for name, feature in features.items():
            step = fitted.steps.get(name)
            if isinstance(feature, Target | Count):
                found.numbers[split][name] = list(_encodings(feature, spec, splits=splits, split=split))
                continue
            if isinstance(step, _Scale):
                scaled = [step(value) for value in columns[column_of(feature)]]
                found.numbers[split][name if feature.as_ == "dense" else f"{name}:value"] = scaled
            if not isinstance(step, _Scale) or feature.as_ == "field":
                _encode(feature, columns, fitted=fitted, found=found, split=split)
    return found


def _nulls(features: Mapping[str, Any], columns: Columns) -> Iterator[tuple[str, int]]:
    """By dense input the rows that lack a value."""
    for name, feature in features.items():
        number = [column_of(feature)] if isinstance(feature, Numeric) and feature.as_ == "dense" else []
        if by := feature.by if isinstance(feature, Target | Count) else number:
            rows = zip(*(columns[column] for column in by), strict=True)
            yield name, sum(any(value is None or value != value for value in row) for row in rows)


def _vocabulary(rules: Any, columns: Mapping[str, None], train: Columns) -> list[tuple[Any, int]]:
    counts: Counter[Any] = Counter()
    for column in columns:
        for cell in train[column]:
            counts.update(v for v in (cell if isinstance(cell, list) else [cell]) if v is not None)
    order = sorted((v for v in counts if counts[v] >= rules.min_count), key=lambda value: (-counts[value], value))
    kept = order[: rules.max_rows - 1] if rules.max_rows else order
    return [(value, counts[value]) for value in kept]


@dataclass(frozen=True)
class _Scale:
    fill: float
    clip: tuple[float, float] | None
    log1p: bool
    mean: float = 0.0
    std: float = 1.0
    loose: bool = False

    def __call__(self, value: float | None) -> float:
        x = self.fill if _absent(value) else float(value)  # type: ignore[arg-type]
        x = min(max(x, self.clip[0]), self.clip[1]) if self.clip else x
        x = math.log1p(max(x, 0.0)) if self.log1p else x
        return (x - self.mean) / self.std


def _fit(feature: Numeric, values: list[float | None]) -> _Scale | list[float]:
    numbers = [float(v) for v in values if not _absent(v)]  # type: ignore[arg-type]
    if feature.as_ == "buckets":
        if feature.boundaries:
            return feature.boundaries
        ordered, buckets = sorted(numbers), feature.quantiles or 2
        return sorted({ordered[at * (len(ordered) - 1) // buckets] for at in range(1, buckets)})
    by = {"mean": statistics.mean, "median": statistics.median}
    fill = by[feature.fill](numbers) if isinstance(feature.fill, str) else feature.fill
    step = _Scale(fill=fill, clip=feature.clip, log1p=feature.log1p)
    x = [step(value) for value in values]
    low, high = min(x), max(x)
    if feature.scale == "none":
        return step
    if feature.scale == "minmax" or low == high:
        mean, std = low, high - low or 1.0
    else:
        mean, std = statistics.mean(x), statistics.pstdev(x)
    loose = std < 1e-8 * max(map(abs, x))
    return _Scale(fill=fill, clip=feature.clip, log1p=feature.log1p, mean=mean, std=std, loose=loose)


@dataclass(frozen=True)
class _Fitted:
    features: Mapping[str, Any]
    vocabularies: Mapping[str, list[tuple[Any, int]]]
    steps: dict[str, _Scale | list[float]] = field(default_factory=dict)

    def keys(self, feature: Any, columns: Columns) -> Iterator[list[Key]]:
        """The keys of each row's values."""
        if isinstance(feature, Cross):
            parts = [self.keys(self.features[name], columns) for name in feature.inputs]
            yield from ([_crossed([cell[0] for cell in cells])] for cells in zip(*parts, strict=True))
            return
        for cell in columns[column_of(feature)]:
            if isinstance(feature, Numeric):
                yield [self._bucket(feature, cell)]
            elif isinstance(feature, Categorical):
                yield [_key(cell)]
            else:
                yield [_key(value) for value in (cell or [])][-feature.max_length :]

    def _bucket(self, feature: Numeric, number: float | None) -> Key:
        edges = self.steps[str(feature.name)]
        if isinstance(edges, _Scale):
            return 0  # a field has one row
        return None if _absent(number) else sum(number >= edge for edge in edges)

    def row(self, feature: Any, key: Key) -> int:
        """The row of the feature's table."""
        if key is None:
            return 0
        if isinstance(feature, Numeric):
            return key + 1
        if feature.hash_rows:
            return _mix(key) % (feature.hash_rows - 1) + 1
        values = [_key(value) for value, _ in self.vocabularies[table_of(feature)]]
        return values.index(key) + 1 if key in values else 0


def _encode(feature: Any, columns: Columns, *, fitted: _Fitted, found: Expected, split: str) -> None:
    """Ids of one feature, with what is missing and unseen among them."""
    name, listed = str(feature.name), isinstance(feature, Bag | Sequence)
    cells = list(fitted.keys(feature, columns))
    rows = [[fitted.row(feature, key) for key in cell] for cell in cells]
    missing = sum(key is None for cell in cells for key in cell)
    found.ids[split][name] = rows if listed else [row[0] for row in rows]
    found.missing[split][name] = missing
    found.unseen[split][name] = sum(row == 0 for cell in rows for row in cell) - missing
    if isinstance(feature, Bag) and feature.weight_column:
        found.numbers[split][f"{name}:value"] = [weights or [] for weights in columns[feature.weight_column]]


def _encodings(
    feature: Target | Count, spec: FeatureSpec, *, splits: Mapping[str, Columns], split: str
) -> Iterator[float]:
    """What the training rows say about each row's values; a training row sees the other folds' labels alone."""
    train, rows = splits["train"], splits[split]
    seen = list(zip(*(train[column] for column in feature.by), strict=True))
    if isinstance(feature, Count):
        for cell in zip(*(rows[column] for column in feature.by), strict=True):
            count = 0 if None in cell else seen.count(cell)
            yield math.log1p(count) if feature.log1p else count
        return
    task = next(task for task in spec.tasks if task.name == feature.task)
    counted = [at for at in range(len(seen)) if task.given is None or train[task.given][at]]
    folds = [_mix(at ^ _mix(_mix(feature.seed))) % feature.folds for at in range(len(seen))]
    for at, cell in enumerate(zip(*(rows[column] for column in feature.by), strict=True)):
        among = [other for other in counted if split != "train" or folds[other] != folds[at]]
        labels = [train[task.name][other] for other in among if None not in cell and seen[other] == cell]
        rate = sum(train[task.name][other] for other in among) / len(among) if among else 0.5
        yield (sum(labels) + feature.smoothing * rate) / (len(labels) + feature.smoothing) if labels else rate


def _absent(value: float | None) -> bool:
    return value is None or math.isnan(value)


def _key(value: str | int | None) -> Key:
    """A whole number is its own key; a text's is FNV-1a of its UTF-8 bytes."""
    if value is None or isinstance(value, int):
        return None if value is None else value % _ALL
    hashed = 0xCBF29CE484222325
    for byte in value.encode():
        hashed = ((hashed ^ byte) * 0x100000001B3) % _ALL
    return hashed


def _mix(key: int) -> int:
    """splitmix64's finaliser."""
    z = (key + 0x9E3779B97F4A7C15) % _ALL
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % _ALL
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % _ALL
    return z ^ (z >> 31)


def _crossed(parts: list[Key]) -> Key:
    crossed = 0
    for part in parts:
        if part is None:
            return None
        crossed = _mix(crossed ^ _mix(part))
    return crossed
