"""How the rows of embedding tables become what a head reads: pure torch, the same in training and in the server.

All of a feature sits in one table row: [vector K | first-order weight | 3 unused zeros], so that one memory access
reads both and the width stays divisible by 4, as FBGEMM needs. A row without vector is [weight | 3 zeros], one without
first-order weight is the vector. A table may store fewer than K floats, which zeros follow here. A bag or a sequence
of at most L ids is looked up as L slots of one id or none each, so that one kind of lookup serves pooled fields, pairs
within a bag and attention over a history.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from etl.schema import IdFeature, Schema
from recsys.models.head import Inputs, ModelConfig, Sizes

LANE = 4


class Part(NamedTuple):
    """What a run gives to a head: a vector a field, the vectors of its single ids, and a first-order weight a field.

    A sequence that stays unpooled has no field, and a mask [B, L], 1 where there is an id; others have [B, 0].
    """

    vectors_BFK: Tensor
    entries_BEK: Tensor
    linear_BF: Tensor
    mask_BL: Tensor


class Run(NamedTuple):
    """Slots `start` to `stop` of a layout that are treated alike: single plain ids, or one feature with several slots.

    `ids` and `floats` say where its ids and values begin in `ids_BS` and `floats_BN`; no values: -1.
    """

    start: int
    stop: int
    plain: bool
    combiner: str = "sum"
    ids: int = 0
    floats: int = -1

    def present_BL(self, ids_BS: Tensor, floats_BN: Tensor) -> Tensor:
        """1 where there is an id, of the type of the floats."""
        return (ids_BS[:, self.ids : self.ids + self.stop - self.start] >= 0).to(floats_BN.dtype)

    def values_BL(self, ids_BS: Tensor, floats_BN: Tensor) -> Tensor:
        """What multiplies the rows: 0 where there is no id."""
        present_BL = self.present_BL(ids_BS, floats_BN)
        return (
            present_BL
            if self.floats < 0
            else present_BL * floats_BN[:, self.floats : self.floats + self.stop - self.start]
        )

    def shares_BL(self, values_BL: Tensor) -> Tensor:
        """What multiplies the vectors that are pooled: for a mean, values that sum to 1.

        What is not positive takes no part in a mean, and an empty bag stays 0.
        """
        if self.combiner == "sum":
            return values_BL
        positive_BL = values_BL.clamp(min=0)
        total_B1 = positive_BL.sum(dim=1, keepdim=True)
        return positive_BL / torch.where(total_B1 > 0, total_B1, 1)

    def part(self, rows_BLW: Tensor, *, dim: int, pooled: bool, ids_BS: Tensor, floats_BN: Tensor) -> Part:
        """What the rows of all slots, of `dim` floats and perhaps a first-order weight, give to a head."""
        # one split: the gradient of a slice would be a matrix of zeros for each of them
        vectors_BLK, rest_BLR = torch.split(rows_BLW, [dim, rows_BLW.shape[2] - dim], dim=2)
        weights_BL1, none_BL = rest_BLR[:, :, :1], floats_BN[:, :0]
        if self.plain:
            return Part(vectors_BLK, vectors_BLK, weights_BL1.flatten(1), none_BL)
        values_BL = self.values_BL(ids_BS, floats_BN)
        linear_B1 = (weights_BL1 * values_BL[:, :, None]).sum(dim=1)
        if not pooled:
            mask_BL = self.present_BL(ids_BS, floats_BN)
            return Part(vectors_BLK[:, :0], vectors_BLK * values_BL[:, :, None], linear_B1, mask_BL)
        entries_BLK = vectors_BLK * self.shares_BL(values_BL)[:, :, None]
        return Part(entries_BLK.sum(dim=1, keepdim=True), entries_BLK, linear_B1, none_BL)


def _joined(parts: Sequence[Tensor], *, none: Tensor) -> Tensor:
    """The parts side by side, without a copy where there is one alone."""
    if len(parts) > 1:
        return torch.cat(list(parts), dim=1)
    return parts[0] if parts else none


@dataclass(frozen=True)
class Layout:
    """Which slots of the id features a model reads, in the order in which their rows stand side by side.

    First the slots of features with a vector (`full` runs, then those that stay unpooled), then those of features with
    a weight alone. `slots` are the EBC's feature names with their tables, `columns` each one's place in `ids_BS`.
    """

    slots: tuple[tuple[str, str], ...]
    columns: tuple[int, ...]
    full: tuple[Run, ...]
    unpooled: tuple[Run, ...]
    weights: tuple[Run, ...]
    sizes: Sizes
    linear: bool
    dims: Mapping[str, int]
    """Of tables whose vectors are smaller than the model's, and end with zeros in it."""

    @classmethod
    def of(cls, schema: Schema, config: ModelConfig, *, dim: int, dims: Mapping[str, int] | None = None) -> "Layout":
        """A model without vectors reads all features as `linear_only`; one without first-order weights skips those.

        `dim` is the size of a vector, `dims` of those of single tables that are smaller.
        """
        with_vector = [f for f in schema.features if config.vectors and not f.linear_only]
        unpooled = [f for f in with_vector if config.unpooled and f.type == "sequence"]
        full = [f for f in with_vector if f not in unpooled]
        weights = [f for f in schema.features if config.linear and f not in with_vector]
        places = _Places(schema)
        full_runs, unpooled_runs, weight_runs = (places.runs(part) for part in (full, unpooled, weights))
        fields = tuple(feature.name for feature in full)
        sequences = tuple((feature.name, feature.slots) for feature in unpooled)
        sizes = Sizes(fields, dim, len(schema.dense), tuple(schema.task_names), sequences)
        slots, vectors = places.slots, sum(feature.slots for feature in with_vector)
        smaller = {table: own for _, table in slots[:vectors] if (own := (dims or {}).get(table, dim)) < dim}
        return cls(
            tuple(slots), tuple(places.columns), full_runs, unpooled_runs, weight_runs, sizes, config.linear, smaller
        )

    @property
    def runs(self) -> tuple[Run, ...]:
        """All runs in order."""
        return (*self.full, *self.unpooled, *self.weights)

    @property
    def vectors(self) -> int:
        """Slots with a vector."""
        return max([0, *(run.stop for run in (*self.full, *self.unpooled))])

    @property
    def width(self) -> int:
        """Floats of a row with a vector; other rows have 4."""
        return self.sizes.dim + (LANE if self.linear else 0)

    def widths(self) -> dict[str, int]:
        """Floats of one row of each table."""
        widths = {table: self.width if at < self.vectors else LANE for at, (_, table) in enumerate(self.slots)}
        return widths | {table: self.width - self.sizes.dim + dim for table, dim in self.dims.items()}

    def vector_sizes(self) -> dict[str, int]:
        """How many columns of each table's rows are a vector; the others are a first-order weight."""
        sizes = {table: self.sizes.dim if at < self.vectors else 0 for at, (_, table) in enumerate(self.slots)}
        return sizes | dict(self.dims)

    def inputs(self, rows_BSW: Tensor, weights_BS: Tensor, *, ids_BS: Tensor, floats_BN: Tensor) -> Inputs:
        """Rows of the slots with a vector and weights of the others, in this layout's order, to what a head reads."""
        parts = []
        for run in self.runs:
            start, stop = run.start - self.vectors, run.stop - self.vectors
            rows_BLW = rows_BSW[:, run.start : run.stop] if start < 0 else weights_BS[:, start:stop, None]
            dim = self.sizes.dim if start < 0 else 0
            parts.append(
                run.part(rows_BLW, dim=dim, pooled=run not in self.unpooled, ids_BS=ids_BS, floats_BN=floats_BN)
            )
        return self.joined(parts, dense_BN=floats_BN[:, : self.sizes.dense])

    def joined(self, parts: Sequence[Part], *, dense_BN: Tensor) -> Inputs:
        """What a head reads, from the parts of all runs or of finer ones, in the order of the slots."""
        full = [part for part in parts if part.vectors_BFK.shape[1:].numel()]
        unpooled = [part for part in parts if part.mask_BL.shape[1]]
        none_BFK = dense_BN.new_empty((dense_BN.shape[0], 0, self.sizes.dim))
        return Inputs(
            _joined([part.vectors_BFK for part in full], none=none_BFK),
            _joined([part.linear_BF for part in parts], none=dense_BN[:, :0]),
            dense_BN,
            _joined([part.entries_BEK for part in full], none=none_BFK),
            tuple(part.entries_BEK for part in unpooled),
            tuple(part.mask_BL for part in unpooled),
        )


class _Places:
    """Lays slots side by side and remembers where their ids and values come from."""

    def __init__(self, schema: Schema) -> None:
        self.slots: list[tuple[str, str]] = []
        self.columns: list[int] = []
        self._ids = {f.name: end - f.slots for f, end in zip(schema.features, schema.slot_ends, strict=True)}
        self._floats = {name: at for at, name in reversed(list(enumerate(schema.float_names)))}

    def runs(self, features: Sequence[IdFeature]) -> tuple[Run, ...]:
        """Neighbours that are plain share a run."""
        found: list[Run] = []
        for feature in features:
            start, begin = len(self.slots), self._ids[feature.name]
            names = [feature.name if feature.slots == 1 else f"{feature.name}.{at}" for at in range(feature.slots)]
            self.slots += [(name, feature.table) for name in names]
            self.columns += range(begin, begin + feature.slots)
            plain = feature.type not in ("bag", "sequence") and not feature.weighted
            if plain and found and found[-1].plain:
                found[-1] = found[-1]._replace(stop=len(self.slots))
                continue
            floats = self._floats[f"{feature.name}:value"] if feature.weighted else -1
            found.append(Run(start, len(self.slots), plain, feature.combiner, begin, floats))
        return tuple(found)
