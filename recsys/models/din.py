"""Deep Interest Network (Zhou et al. 2018, https://arxiv.org/abs/1706.06978): histories weighed by the candidate."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.models.head import Head, Inputs, ModelConfig, Sizes
from recsys.models.histories import AttentionPair, Histories
from recsys.models.layers import activation
from recsys.models.tower import MLP, Tower, Widths


class DINConfig(Tower, ModelConfig):
    """Histories summed by how much each position matters to the candidate, then an MLP; an empty one gives zeros."""

    paper: ClassVar[str] = "https://arxiv.org/abs/1706.06978"
    linear: ClassVar[bool] = False
    unpooled: ClassVar[bool] = True
    kind: Literal["din"] = "din"
    attention: list[AttentionPair] = Field(min_length=1, description="candidates and their histories")
    attention_hidden: Widths = Field([36])
    attention_activation: Literal["relu", "prelu", "dice", "sigmoid"] = "dice"
    normalise: Literal["none", "softmax"] = Field("none", description="none: the sum keeps how strong an interest is")
    scale: bool = Field(False, description="divide scores by the root of a position's width")
    share_attention: bool = Field(False, description="pairs of one width share the network that weighs positions")

    def faults(self, sizes: Sizes) -> list[str]:
        return [*super().faults(sizes), *(fault for pair in self.attention for fault in pair.faults(sizes))]

    def head(self, sizes: Sizes) -> Head:
        return DIN(self, sizes)


class ActivationUnit(nn.Module):
    """Equation 3: sum over positions of a(q, k) k, a an MLP on [q, k, q - k, q * k]: [B, D], [B, L, D] -> [B, D]."""

    def __init__(self, width: int, *, config: DINConfig) -> None:
        super().__init__()
        hidden = config.attention_hidden
        self.linears = nn.ModuleList(nn.Linear(*sizes) for sizes in zip([4 * width, *hidden[:-1]], hidden, strict=True))
        self.activations = nn.ModuleList(activation(config.attention_activation, size) for size in hidden)
        self.softmax = config.normalise == "softmax"
        self.score = nn.Linear(hidden[-1], 1, bias=not self.softmax)  # a softmax does not see a constant
        self.factor = width**-0.5 if config.scale else 1.0

    def forward(self, query_BD: Tensor, keys_BLD: Tensor, valid_BL: Tensor) -> Tensor:
        # most positions of most histories are empty: only the others are worth the work
        rows_V = valid_BL.flatten().nonzero().squeeze(1)
        query_VD, keys_VD = query_BD[rows_V // valid_BL.shape[1]], keys_BLD.flatten(0, 1)[rows_V]
        scores_V = self.scores_V(query_VD, keys_VD)
        scores_BL = scores_V.new_zeros(valid_BL.numel()).index_copy(0, rows_V, scores_V).view(valid_BL.shape)
        if self.softmax:
            scores_BL = scores_BL.masked_fill(~valid_BL, torch.finfo(scores_BL.dtype).min).softmax(dim=1)
        return (scores_BL.masked_fill(~valid_BL, 0)[:, :, None].to(keys_BLD.dtype) * keys_BLD).sum(dim=1)

    def scores_V(self, query_VD: Tensor, keys_VD: Tensor) -> Tensor:
        """a(q, k) of single positions, all of which batch statistics count."""
        x_VD = torch.cat([query_VD, keys_VD, query_VD - keys_VD, query_VD * keys_VD], dim=1)
        for linear, act in zip(self.linears, self.activations, strict=True):
            x_VD = act(linear(x_VD))
        scores_V: Tensor = self.factor * self.score(x_VD).squeeze(1)
        return scores_V


class DIN(Head):
    """logit = MLP(vectors, attended histories, dense)."""

    def __init__(self, config: DINConfig, sizes: Sizes) -> None:
        super().__init__()
        self.histories = Histories(config.attention, sizes)
        widths = self.histories.widths
        self.names = [f"width{width}" if config.share_attention else f"pair{at}" for at, width in enumerate(widths)]
        named = dict(zip(self.names, widths, strict=True))
        self.units = nn.ModuleDict({name: ActivationUnit(width, config=config) for name, width in named.items()})
        self.deep = MLP(self.histories.deep + sum(widths), tower=config, out=len(sizes.tasks))

    def forward(self, inputs: Inputs) -> Tensor:
        attended = [self.units[name](*read) for name, read in zip(self.names, self.histories.read(inputs), strict=True)]
        logits_BT: Tensor = self.deep(self.histories.deep_BD(inputs, attended))
        return logits_BT
