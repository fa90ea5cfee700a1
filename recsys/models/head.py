"""What every model is: a config section that builds a head, and a head that turns inputs into logits."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from etl.spec import Section


class Sizes(NamedTuple):
    """How large a head is: names of the fields with a vector, K, N dense inputs, names of the tasks.

    `sequences` names the features that come unpooled, with the length L of each.
    """

    fields: tuple[str, ...]
    dim: int
    dense: int
    tasks: tuple[str, ...]
    sequences: tuple[tuple[str, int], ...] = ()

    @property
    def pairs(self) -> int:
        """Pairs of fields."""
        return len(self.fields) * (len(self.fields) - 1) // 2

    @property
    def deep(self) -> int:
        """Width of all vectors and dense inputs side by side."""
        return len(self.fields) * self.dim + self.dense


class Inputs(NamedTuple):
    """What a head reads, all float32; parts a model does not ask for are empty.

    Every id contributes its row times its value (1 unless the feature has values). `emb_BFK` holds one vector a field,
    its ids pooled; `entries_BEK` the vectors of the single ids that were pooled, zero where there is none; `linear_BL`
    the first-order weight of every id feature, summed, `linear_only` ones last. `sequences` are [B, L, K] and `masks`
    [B, L], 1 where there is an id; they stand in the order of `Sizes.sequences`, newest last.
    """

    emb_BFK: Tensor
    linear_BL: Tensor
    dense_BN: Tensor
    entries_BEK: Tensor
    sequences: tuple[Tensor, ...] = ()
    masks: tuple[Tensor, ...] = ()

    def deep_BD(self) -> Tensor:
        """All vectors and dense inputs side by side."""
        return torch.cat([self.emb_BFK.flatten(1), self.dense_BN], dim=1)


class Head(nn.Module, ABC):
    """Plain single-device torch; subclasses define `forward(inputs) -> logits_BT`."""

    @abstractmethod
    def forward(self, inputs: Inputs) -> Tensor:
        """Logits [B, T]; the sigmoid and the loss sit outside."""

    def penalty(self) -> Tensor | None:
        """Regularisers that are this model's own, a scalar added to the loss; None where there are none."""
        return None

    def activation_penalty_B(self, inputs: Inputs, *, l2: float, linear_l2: float) -> Tensor:
        """What `l2_scope = "activations"` adds to the loss for each row: half the squares of what the rows gave."""
        vectors_B = inputs.emb_BFK.square().sum(dim=(1, 2))
        return 0.5 * (l2 * vectors_B + linear_l2 * inputs.linear_BL.sum(dim=1).square())


class ModelConfig(Section, ABC):
    """The `[model]` section. A subclass sets `kind` and what it reads.

    `vectors`, `linear`: whether rows hold vectors and first-order weights. `unpooled`: whether sequence features come
    as they are instead of pooled into a field.
    """

    paper: ClassVar[str]
    vectors: ClassVar[bool] = True
    linear: ClassVar[bool] = True
    unpooled: ClassVar[bool] = False

    def build(self, sizes: Sizes) -> Head:
        """The head, its weights not yet initialised. Raises ValueError where `faults` is not empty."""
        if faults := self.faults(sizes):
            raise ValueError("; ".join(faults))
        return self.head(sizes)

    @abstractmethod
    def head(self, sizes: Sizes) -> Head:
        """The head of a model that has what it needs."""

    def faults(self, sizes: Sizes) -> Sequence[str]:
        """What the features and tasks lack for this model, a sentence each."""
        return [] if sizes.fields or not self.vectors else ["needs at least one feature with a vector"]
