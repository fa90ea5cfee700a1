"""Wide & Deep (Cheng et al. 2016, https://arxiv.org/abs/1606.07792): a linear model beside an MLP."""

from typing import ClassVar, Literal

from torch import Tensor

from recsys.models.head import Head, Inputs, ModelConfig, Sizes
from recsys.models.linear import FirstOrder
from recsys.models.tower import MLP, Tower


class WideDeepConfig(Tower, ModelConfig):
    """First-order weights of ids, crosses and dense inputs, and an MLP on vectors and dense inputs."""

    paper: ClassVar[str] = "https://arxiv.org/abs/1606.07792"
    kind: Literal["wide_deep"] = "wide_deep"

    def head(self, sizes: Sizes) -> Head:
        return WideDeep(self, sizes)


class WideDeep(Head):
    """Equation 3: logit = wide + deep, each with its own bias."""

    def __init__(self, config: WideDeepConfig, sizes: Sizes) -> None:
        super().__init__()
        self.wide = FirstOrder(dense=sizes.dense, tasks=len(sizes.tasks))
        self.deep = MLP(sizes.deep, tower=config, out=len(sizes.tasks))

    def forward(self, inputs: Inputs) -> Tensor:
        logits_BT: Tensor = self.wide(inputs.linear_BL, inputs.dense_BN) + self.deep(inputs.deep_BD())
        return logits_BT
