"""What dense features fill: rows without their number, counted while the rows pass to an engine."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from etl.spec import Count, FeatureSpec, Numeric, Target, column_of, resolve


class DenseNulls:
    """Counts by dense feature the rows that lack its number or, of an encoding, one of its values."""

    def __init__(self, spec: FeatureSpec) -> None:
        self._columns = {str(feature.name): found for feature in resolve(spec.features) if (found := _columns(feature))}

    def of(self, batch: pa.RecordBatch) -> dict[str, int]:
        """By feature, of some typed rows."""
        return {name: _rows_with_null([batch[column] for column in columns]) for name, columns in self._columns.items()}


def _columns(feature: object) -> list[str]:
    """The raw columns of a dense feature; none of another."""
    if isinstance(feature, Numeric) and feature.as_ == "dense":
        return [column_of(feature)]
    return feature.by if isinstance(feature, Target | Count) else []


def _rows_with_null(columns: Sequence[pa.Array]) -> int:
    held = [column for column in columns if column.null_count]
    if len(held) < 2:
        return sum(column.null_count for column in held)
    return int(np.any([column.is_null().to_numpy(zero_copy_only=False) for column in held], axis=0).sum())
