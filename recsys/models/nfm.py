"""Neural FM (He and Chua 2017, https://arxiv.org/abs/1708.05027): an MLP on the sum of all pairs' products."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.models.head import Head, Inputs, ModelConfig, Sizes
from recsys.models.layers import Dropout, batch_norm, pairs_BK
from recsys.models.linear import FirstOrder
from recsys.models.tower import MLP, Keep, Tower


class NFMConfig(Tower, ModelConfig):
    """First-order weights, and an MLP on the bi-interaction of all vectors and on dense inputs."""

    paper: ClassVar[str] = "https://arxiv.org/abs/1708.05027"
    kind: Literal["nfm"] = "nfm"
    bi_keep: Keep = Field(1.0, description="share of the bi-interaction vector kept in training")
    bi_batch_norm: bool = Field(False, description="normalise the bi-interaction vector before its dropout")
    compat: Literal["none", "seed"] = Field(
        "none", description="seed: bi_keep holds for the first layer too, and each layer takes the keep_prob before its"
    )

    def layers(self) -> Tower:
        """The MLP's settings, each layer with the keep probability that it uses."""
        if self.compat == "none":
            return self
        count = len(self.hidden)
        keeps = self.keep_prob if isinstance(self.keep_prob, list) else [self.keep_prob] * count
        return self.model_copy(update={"keep_prob": [self.bi_keep, *keeps][:count]})

    def head(self, sizes: Sizes) -> Head:
        return NFM(self, sizes)


class NFM(Head):
    """Equations 2 to 6: logit = first order + MLP(bi-interaction, dense). Pairs are of ids: also within a bag."""

    def __init__(self, config: NFMConfig, sizes: Sizes) -> None:
        super().__init__()
        self.first_order = FirstOrder(dense=sizes.dense, tasks=len(sizes.tasks))
        self.bi_norm = batch_norm(sizes.dim) if config.bi_batch_norm else nn.Identity()
        self.bi_dropout = Dropout(config.bi_keep)
        self.deep = MLP(sizes.dim + sizes.dense, tower=config.layers(), out=len(sizes.tasks))

    def forward(self, inputs: Inputs) -> Tensor:
        bi_BK = self.bi_dropout(self.bi_norm(pairs_BK(inputs.entries_BEK)))
        first_BT = self.first_order(inputs.linear_BL, inputs.dense_BN)
        logits_BT: Tensor = first_BT + self.deep(torch.cat([bi_BK, inputs.dense_BN], dim=1))
        return logits_BT
