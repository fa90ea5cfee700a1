"""Attentional FM (Xiao et al. 2017, https://arxiv.org/abs/1708.04617): pairs weighed by an attention network."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.models.head import Head, Inputs, ModelConfig, Sizes
from recsys.models.layers import Dropout, half_squares, pair_indices
from recsys.models.linear import FirstOrder
from recsys.models.tower import MLP, Keep, Tower, Widths


class AFMConfig(ModelConfig):
    """First-order weights, and the products of all pairs of fields summed with learnt weights."""

    paper: ClassVar[str] = "https://arxiv.org/abs/1708.04617"
    kind: Literal["afm"] = "afm"
    attention: Widths = Field([8], description="widths of the attention network's hidden layers; the paper has one")
    attention_keep: Keep = Field(1.0, description="share of the attention weights kept in training")
    pooled_keep: Keep = Field(1.0, description="share of the pooled vector kept in training")
    attention_l2: float = Field(
        0.0, ge=0, description="half of this times the attention layers' squared weights joins the loss"
    )
    mask_empty: bool = Field(False, description="pairs with a field that is empty in a row get no attention")
    projection_bias: bool = Field(False, description="a bias on the projection, beside the model's own")

    def head(self, sizes: Sizes) -> Head:
        return AFM(self, sizes)


class AFM(Head):
    """Equations 4 to 6: logit = first order + p . sum over pairs a_ij m_ij, a = softmax of h . ReLU(W m + b).

    m_ij = e_i * e_j of two fields' pooled vectors; a field is empty where its vector is 0. All tasks share a.
    """

    first_P: Tensor
    second_P: Tensor

    def __init__(self, config: AFMConfig, sizes: Sizes) -> None:
        super().__init__()
        self.attention_l2, self.mask_empty = config.attention_l2, config.mask_empty
        self.first_order = FirstOrder(dense=sizes.dense, tasks=len(sizes.tasks))
        self.attention = MLP(sizes.dim, tower=Tower(hidden=config.attention), out=0)
        self.score = nn.Linear(self.attention.width, 1, bias=False)
        self.attention_dropout = Dropout(config.attention_keep)
        self.pooled_dropout = Dropout(config.pooled_keep)
        self.projection = nn.Linear(sizes.dim, len(sizes.tasks), bias=config.projection_bias)
        for name, side_P in zip(("first_P", "second_P"), pair_indices(len(sizes.fields)), strict=True):
            self.register_buffer(name, side_P, persistent=False)

    def forward(self, inputs: Inputs) -> Tensor:
        emb_BFK = inputs.emb_BFK
        pairs_BPK = emb_BFK.index_select(1, self.first_P) * emb_BFK.index_select(1, self.second_P)
        scores_BP = self.score(self.attention(pairs_BPK)).squeeze(2)
        weights_BP = self.attention_dropout(self.softmax(scores_BP, emb_BFK))
        pooled_BK = self.pooled_dropout((weights_BP[:, :, None] * pairs_BPK).sum(dim=1))
        first_BT = self.first_order(inputs.linear_BL, inputs.dense_BN)
        logits_BT: Tensor = first_BT + self.projection(pooled_BK)
        return logits_BT

    def softmax(self, scores_BP: Tensor, emb_BFK: Tensor) -> Tensor:
        """Attention weights [B, P]; with `mask_empty` all are 0 in a row that has no pair."""
        if not self.mask_empty:
            return scores_BP.softmax(dim=1)
        filled_BF = (emb_BFK != 0).any(dim=2)
        both_BP = filled_BF.index_select(1, self.first_P) & filled_BF.index_select(1, self.second_P)
        lowest = torch.finfo(scores_BP.dtype).min
        return scores_BP.masked_fill(~both_BP, lowest).softmax(dim=1) * both_BP

    def penalty(self) -> Tensor | None:
        """`attention_l2` times half the squares of W."""
        if not self.attention_l2:
            return None
        layers = [layer.weight for layer in self.attention.modules() if isinstance(layer, nn.Linear)]
        return self.attention_l2 * half_squares(layers)
