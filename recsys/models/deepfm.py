"""DeepFM (Guo et al. 2017, https://arxiv.org/abs/1703.04247): a factorization machine beside an MLP."""

from typing import ClassVar, Literal

from torch import Tensor

from recsys.models.head import Head, Inputs, ModelConfig, Sizes
from recsys.models.layers import pairs_BK
from recsys.models.linear import FirstOrder
from recsys.models.tower import MLP, Tower


class DeepFMConfig(Tower, ModelConfig):
    """Pairwise products of all vectors, first-order weights, and an MLP on vectors and dense inputs."""

    paper: ClassVar[str] = "https://arxiv.org/abs/1703.04247"
    kind: Literal["deepfm"] = "deepfm"

    def head(self, sizes: Sizes) -> Head:
        return DeepFM(self, sizes)


class DeepFM(Head):
    """Equations 1 to 4: logit = first order + pairs + MLP. Pairs are of features: also within a bag."""

    def __init__(self, config: DeepFMConfig, sizes: Sizes) -> None:
        super().__init__()
        self.first_order = FirstOrder(dense=sizes.dense, tasks=len(sizes.tasks))
        self.deep = MLP(sizes.deep, tower=config, out=len(sizes.tasks))

    def forward(self, inputs: Inputs) -> Tensor:
        first_BT = self.first_order(inputs.linear_BL, inputs.dense_BN)
        pairs_B1 = pairs_BK(inputs.entries_BEK).sum(dim=1, keepdim=True)
        logits_BT: Tensor = first_BT + pairs_B1 + self.deep(inputs.deep_BD())
        return logits_BT
