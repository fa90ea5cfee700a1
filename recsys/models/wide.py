"""The wide half of Wide & Deep alone: logistic regression on ids, crosses and dense inputs, the baseline."""

from typing import ClassVar, Literal

from torch import Tensor

from recsys.models.head import Head, Inputs, ModelConfig, Sizes
from recsys.models.linear import FirstOrder


class WideConfig(ModelConfig):
    """One weight for each id and each dense input, no vectors."""

    paper: ClassVar[str] = "https://arxiv.org/abs/1606.07792"
    vectors: ClassVar[bool] = False
    kind: Literal["wide"] = "wide"

    def head(self, sizes: Sizes) -> Head:
        return Wide(sizes)


class Wide(Head):
    """logit = bias + sum of weights."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.first_order = FirstOrder(dense=sizes.dense, tasks=len(sizes.tasks))

    def forward(self, inputs: Inputs) -> Tensor:
        logits_BT: Tensor = self.first_order(inputs.linear_BL, inputs.dense_BN)
        return logits_BT
