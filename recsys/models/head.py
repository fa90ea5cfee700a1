"""What every model is: a config section that builds a head, and a head that turns inputs into logits."""

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from etl.spec import Section

Widths = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1, description="widths of the hidden layers")]
KeepProb = Annotated[float, Field(gt=0, le=1, description="share of each hidden layer's outputs kept in training")]


class Sizes(NamedTuple):
    """How large a head is: F fields with a vector, K, N dense inputs, T tasks."""

    fields: int
    dim: int
    dense: int
    tasks: int

    @property
    def deep(self) -> int:
        """Width of all vectors and dense inputs side by side."""
        return self.fields * self.dim + self.dense


class Inputs(NamedTuple):
    """What a head reads, all float32.

    `emb_BFK` holds a vector for each feature that is not `linear_only`; `linear_BL` the first-order weight of every id
    feature, `linear_only` ones last; parts a model does not ask for are empty.
    """

    emb_BFK: Tensor
    linear_BL: Tensor
    dense_BN: Tensor

    def deep_BD(self) -> Tensor:
        """All vectors and dense inputs side by side."""
        return torch.cat([self.emb_BFK.flatten(1), self.dense_BN], dim=1)


class Head(nn.Module, ABC):
    """Plain single-device torch; subclasses define `forward(inputs) -> logits_BT`."""

    @abstractmethod
    def forward(self, inputs: Inputs) -> Tensor:
        """Logits [B, T]; the sigmoid and the loss sit outside."""


class ModelConfig(Section):
    """The `[model]` section; a subclass sets `kind` and whether rows hold vectors and first-order weights."""

    paper: ClassVar[str]
    vectors: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    @abstractmethod
    def build(self, sizes: Sizes) -> Head:
        """The head, its weights not yet initialised."""
