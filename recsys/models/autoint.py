"""AutoInt (Song et al. 2019, https://arxiv.org/abs/1810.11921): self-attention over the fields."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.models.head import Head, Inputs, ModelConfig, Sizes
from recsys.models.tower import MLP, Tower


class AutoIntConfig(Tower, ModelConfig):
    """Layers in which the vectors of the fields attend to each other; every dense input is a field too."""

    paper: ClassVar[str] = "https://arxiv.org/abs/1810.11921"
    linear: ClassVar[bool] = False
    kind: Literal["autoint"] = "autoint"
    attention_layers: int = Field(3, ge=1, description="attentions one after another")
    heads: int = Field(2, ge=1, description="attentions side by side in one layer")
    attention_dim: int = Field(32, ge=1, description="width of one head")
    scaled: bool = Field(False, description="divide the scores by the root of 'attention_dim'; the paper does not")
    deep: bool = Field(True, description="add the MLP on vectors and dense inputs (AutoInt+)")

    def head(self, sizes: Sizes) -> Head:
        return AutoInt(self, sizes)


class AutoInt(Head):
    """logit = W [attended fields] + b (equation 9), plus an MLP (AutoInt+)."""

    def __init__(self, config: AutoIntConfig, sizes: Sizes) -> None:
        super().__init__()
        tasks, out = len(sizes.tasks), config.heads * config.attention_dim
        self.dense_NK = nn.Parameter(torch.zeros(sizes.dense, sizes.dim))
        self.layers = nn.Sequential(
            *(Interacting(out if at else sizes.dim, config=config) for at in range(config.attention_layers))
        )
        self.out = nn.Linear((len(sizes.fields) + sizes.dense) * out, tasks)
        self.deep = MLP(sizes.deep, tower=config, out=tasks) if config.deep else None

    def init(self, generator: torch.Generator) -> None:
        """The vectors of the dense inputs Glorot uniform."""
        if self.dense_NK.numel():
            nn.init.xavier_uniform_(self.dense_NK, generator=generator)

    def forward(self, inputs: Inputs) -> Tensor:
        dense_BNK = inputs.dense_BN[:, :, None] * self.dense_NK
        attended_BFD = self.layers(torch.cat([inputs.emb_BFK, dense_BNK], dim=1))
        logits_BT: Tensor = self.out(attended_BFD.flatten(1))
        return logits_BT if self.deep is None else logits_BT + self.deep(inputs.deep_BD())


class Interacting(nn.Module):
    """relu([heads' softmax(Q K') V] + W x) (equations 5 to 8): [B, F, D] -> [B, F, heads x attention_dim]."""

    def __init__(self, width: int, *, config: AutoIntConfig) -> None:
        super().__init__()
        self.heads = (config.heads, config.attention_dim)
        self.scale = config.attention_dim**-0.5 if config.scaled else 1.0
        out = config.heads * config.attention_dim
        self.query, self.key = nn.Linear(width, out, bias=False), nn.Linear(width, out, bias=False)
        self.value, self.residual = nn.Linear(width, out, bias=False), nn.Linear(width, out, bias=False)

    def forward(self, x_BFD: Tensor) -> Tensor:
        query, key, value = (
            layer(x_BFD).unflatten(2, self.heads).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        heads_BHFA = nn.functional.scaled_dot_product_attention(query, key, value, scale=self.scale)
        return torch.relu(heads_BHFA.transpose(1, 2).flatten(2) + self.residual(x_BFD))
