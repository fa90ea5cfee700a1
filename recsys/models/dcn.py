"""DCN (Wang et al. 2017, https://arxiv.org/abs/1708.05123): crosses of growing degree beside an MLP."""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.models.head import Head, Inputs, ModelConfig, Sizes
from recsys.models.layers import half_squares
from recsys.models.tower import MLP, Tower

_CUT_STD = 0.87962566  # standard deviation of N(0, 1) cut off at -2 and 2


class DCNConfig(Tower, ModelConfig):
    """A cross network with one weight vector a layer, and an MLP, both on all vectors and dense inputs."""

    paper: ClassVar[str] = "https://arxiv.org/abs/1708.05123"
    linear: ClassVar[bool] = False
    kind: Literal["dcn"] = "dcn"
    cross_layers: int = Field(3, ge=1, description="cross products one after another")
    cross_l2: float = Field(0.0, ge=0, description="half of this times the squared cross weights and biases")
    cross_bias_init: Literal["zeros", "glorot"] = Field("zeros", description="glorot: random, drawn as the weights are")

    def head(self, sizes: Sizes) -> Head:
        return DCN(self, sizes)


class DCN(Head):
    """logit = W [cross network, MLP] + b (equation 5)."""

    def __init__(self, config: DCNConfig, sizes: Sizes) -> None:
        super().__init__()
        self.cross_l2 = config.cross_l2
        self.cross = Cross(sizes.deep, layers=config.cross_layers, bias_init=config.cross_bias_init)
        self.deep = MLP(sizes.deep, tower=config, out=0)
        self.out = nn.Linear(sizes.deep + self.deep.width, len(sizes.tasks))

    def forward(self, inputs: Inputs) -> Tensor:
        x_BD = inputs.deep_BD()
        logits_BT: Tensor = self.out(torch.cat([self.cross(x_BD), self.deep(x_BD)], dim=1))
        return logits_BT

    def penalty(self) -> Tensor | None:
        return self.cross_l2 * half_squares([self.cross.weight_CD, self.cross.bias_CD]) if self.cross_l2 else None


class Cross(nn.Module):
    """C layers x' = x0 (x . w) + b + x (equation 3): [B, D] -> [B, D]."""

    def __init__(self, width: int, *, layers: int, bias_init: Literal["zeros", "glorot"]) -> None:
        super().__init__()
        self.layers, self.bias_init = layers, bias_init
        self.weight_CD = nn.Parameter(torch.zeros(layers, width))
        self.bias_CD = nn.Parameter(torch.zeros(layers, width))

    def init(self, generator: torch.Generator) -> None:
        """Truncated normal weights; their fans are the number of layers and D, as in TensorFlow for such a matrix."""
        _glorot_normal(self.weight_CD, generator)
        if self.bias_init == "glorot":
            _glorot_normal(self.bias_CD, generator)
        else:
            nn.init.zeros_(self.bias_CD)

    def forward(self, x0_BD: Tensor) -> Tensor:
        x_BD = x0_BD
        for at in range(self.layers):
            x_BD = x0_BD * (x_BD @ self.weight_CD[at])[:, None] + self.bias_CD[at] + x_BD
        return x_BD


def _glorot_normal(matrix: Tensor, generator: torch.Generator) -> None:
    """Normal, cut off at two of its standard deviations, and of standard deviation sqrt(2 / sum of fans) then."""
    std = math.sqrt(2 / sum(matrix.shape)) / _CUT_STD
    nn.init.trunc_normal_(matrix, std=std, a=-2 * std, b=2 * std, generator=generator)
