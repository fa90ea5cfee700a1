"""DeepFM (Guo et al. 2017, https://arxiv.org/abs/1703.04247): a factorization machine beside an MLP."""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from recsys.models.head import Head, Inputs, KeepProb, ModelConfig, Sizes, Widths
from recsys.models.layers import MLP, FirstOrder


class DeepFMConfig(ModelConfig):
    """Pairwise products of all field vectors, first-order weights, and an MLP on vectors and dense inputs."""

    paper: ClassVar[str] = "https://arxiv.org/abs/1703.04247"
    kind: Literal["deepfm"] = "deepfm"
    hidden: Widths = Field([256, 128, 64])
    keep_prob: KeepProb = 0.5

    def build(self, sizes: Sizes) -> Head:
        return DeepFM(self, sizes)


class DeepFM(Head):
    """Equations 1 to 4: logit = first order + pairs + MLP."""

    def __init__(self, config: DeepFMConfig, sizes: Sizes) -> None:
        super().__init__()
        self.first_order = FirstOrder(dense=sizes.dense, tasks=sizes.tasks)
        self.deep = MLP(sizes.deep, hidden=config.hidden, out=sizes.tasks, keep_prob=config.keep_prob)

    def forward(self, inputs: Inputs) -> Tensor:
        first_BT = self.first_order(inputs.linear_BL, inputs.dense_BN)
        logits_BT: Tensor = first_BT + pairs_B1(inputs.emb_BFK) + self.deep(inputs.deep_BD())
        return logits_BT


def pairs_B1(emb_BFK: Tensor) -> Tensor:
    """Sum of the dot products of all pairs of fields, as 1/2 ((sum e)^2 - sum e^2) (Rendle 2010, lemma 3.1)."""
    square_of_sum_BK = emb_BFK.sum(dim=1).square()
    sum_of_squares_BK = emb_BFK.square().sum(dim=1)
    return 0.5 * (square_of_sum_BK - sum_of_squares_BK).sum(dim=1, keepdim=True)
