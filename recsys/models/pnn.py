"""PNN (Qu et al. 2016, https://arxiv.org/abs/1611.00144): an MLP on vectors and products of their pairs.

As in the authors' code, vectors and products enter one hidden layer side by side, without the paper's signal layers.
"""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.models.fnn import LogitTower
from recsys.models.head import Head, Inputs, ModelConfig, Sizes
from recsys.models.layers import pair_indices


class PNN1Config(LogitTower, ModelConfig):
    """An MLP on vectors, their pairs' inner products and dense inputs; `linear_only` features are not read."""

    paper: ClassVar[str] = "https://arxiv.org/abs/1611.00144"
    linear: ClassVar[bool] = False
    kind: Literal["pnn1"] = "pnn1"

    def head(self, sizes: Sizes) -> Head:
        return PNN1(self, sizes)


class PNN2Config(LogitTower, ModelConfig):
    """An MLP on vectors, a learnt product of each pair and dense inputs; `linear_only` features are not read."""

    paper: ClassVar[str] = "https://arxiv.org/abs/1807.00311"
    linear: ClassVar[bool] = False
    kind: Literal["pnn2"] = "pnn2"
    kernel: Literal["mat", "vec", "num"] = Field(
        "mat", description="what weighs a pair's products: a K x K matrix, K numbers or one number a pair"
    )

    def head(self, sizes: Sizes) -> Head:
        return PNN2(self, sizes)


class PNN1(Head):
    """Section III-B: logit = MLP(vectors, <e_i, e_j> of i < j, dense)."""

    product_P: Tensor

    def __init__(self, config: PNN1Config, sizes: Sizes) -> None:
        super().__init__()
        self.mlp = config.mlp(sizes.deep + sizes.pairs, out=len(sizes.tasks))
        first_P, second_P = pair_indices(len(sizes.fields))
        self.register_buffer("product_P", first_P * len(sizes.fields) + second_P, persistent=False)

    def forward(self, inputs: Inputs) -> Tensor:
        emb_BFK = inputs.emb_BFK
        products_BFF = torch.bmm(emb_BFK, emb_BFK.transpose(1, 2))
        products_BP = products_BFF.flatten(1).index_select(1, self.product_P)
        logits_BT: Tensor = self.mlp(torch.cat([emb_BFK.flatten(1), products_BP, inputs.dense_BN], dim=1))
        return logits_BT


class PNN2(Head):
    """Kernel product (KPNN, Qu et al. 2018): logit = MLP(vectors, e_j A_p e_i of each pair p = (i < j), dense).

    `kernel` is A: [P, K, K], its middle axis meeting the later field, or the diagonal of each A_p, [P, K] or [P, 1].
    """

    first_P: Tensor
    second_P: Tensor

    def __init__(self, config: PNN2Config, sizes: Sizes) -> None:
        super().__init__()
        self.mlp = config.mlp(sizes.deep + sizes.pairs, out=len(sizes.tasks))
        shapes = {"mat": (sizes.pairs, sizes.dim, sizes.dim), "vec": (sizes.pairs, sizes.dim), "num": (sizes.pairs, 1)}
        self.kernel = nn.Parameter(torch.zeros(shapes[config.kernel]))
        for name, side_P in zip(("first_P", "second_P"), pair_indices(len(sizes.fields)), strict=True):
            self.register_buffer(name, side_P, persistent=False)

    def init(self, generator: torch.Generator) -> None:
        """Uniform within sqrt(6 / sum of all axes), as in the published code."""
        bound = math.sqrt(6 / sum(self.kernel.shape))
        nn.init.uniform_(self.kernel, -bound, bound, generator=generator)

    def forward(self, inputs: Inputs) -> Tensor:
        first_BPK = inputs.emb_BFK.index_select(1, self.first_P)
        second_BPK = inputs.emb_BFK.index_select(1, self.second_P)
        if self.kernel.dim() == 3:
            weighed_BPK = torch.bmm(second_BPK.transpose(0, 1), self.kernel).transpose(0, 1)
        else:
            weighed_BPK = second_BPK * self.kernel
        products_BP = (first_BPK * weighed_BPK).sum(dim=2)
        logits_BT: Tensor = self.mlp(torch.cat([inputs.emb_BFK.flatten(1), products_BP, inputs.dense_BN], dim=1))
        return logits_BT
