"""Deep Crossing (Shan et al. 2016, https://doi.org/10.1145/2939672.2939704): residual units on embedded features."""

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from recsys.models.head import Head, Inputs, ModelConfig, Sizes
from recsys.models.layers import Dropout, batch_norm
from recsys.models.tower import KeepProb, Widths


class DeepCrossingConfig(ModelConfig):
    """Residual units on all vectors and dense inputs."""

    paper: ClassVar[str] = "https://doi.org/10.1145/2939672.2939704"
    linear: ClassVar[bool] = False
    kind: Literal["deep_crossing"] = "deep_crossing"
    hidden: Widths = Field([512, 512, 256, 128, 64], description="inner widths of the residual units")
    embedding_activation: Literal["relu", "none"] = Field("relu", description="relu: of each vector plus a bias")
    keep_prob: KeepProb = 1.0
    batch_norm: bool = Field(False, description="before each unit's last activation, after the sum")

    @model_validator(mode="after")
    def _one_a_unit(self) -> "DeepCrossingConfig":
        if isinstance(self.keep_prob, list) and len(self.keep_prob) != len(self.hidden):
            raise ValueError(f"'keep_prob' has {len(self.keep_prob)} values for {len(self.hidden)} residual units")
        return self

    def head(self, sizes: Sizes) -> Head:
        return DeepCrossing(self, sizes)


class DeepCrossing(Head):
    """Embedding, stacking, residual and scoring layers (section 4); dense inputs are stacked as they are."""

    def __init__(self, config: DeepCrossingConfig, sizes: Sizes) -> None:
        super().__init__()
        relu = config.embedding_activation == "relu"
        self.bias_FK = nn.Parameter(torch.zeros(len(sizes.fields), sizes.dim)) if relu else None
        keeps = config.keep_prob if isinstance(config.keep_prob, list) else [config.keep_prob] * len(config.hidden)
        self.units = nn.Sequential(
            *(
                Unit(sizes.deep, inner=inner, norm=config.batch_norm, keep_prob=keep)
                for inner, keep in zip(config.hidden, keeps, strict=True)
            )
        )
        self.out = nn.Linear(sizes.deep, len(sizes.tasks))

    def forward(self, inputs: Inputs) -> Tensor:
        if self.bias_FK is not None:
            inputs = inputs._replace(emb_BFK=torch.relu(inputs.emb_BFK + self.bias_FK))
        logits_BT: Tensor = self.out(self.units(inputs.deep_BD()))
        return logits_BT


class Unit(nn.Module):
    """relu(norm(W1 relu(W0 x + b0) + b1 + x)), then dropout (section 4.3, figure 2): [B, D] -> [B, D]."""

    def __init__(self, width: int, *, inner: int, norm: bool, keep_prob: float) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm = batch_norm(width) if norm else nn.Identity()
        self.dropout = Dropout(keep_prob) if keep_prob < 1 else nn.Identity()

    def forward(self, x_BD: Tensor) -> Tensor:
        sum_BD = self.outer(torch.relu(self.inner(x_BD))) + x_BD
        out_BD: Tensor = self.dropout(torch.relu(self.norm(sum_BD)))
        return out_BD
