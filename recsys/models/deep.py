"""The deep half of Wide & Deep alone: vectors and dense inputs into an MLP."""

from typing import ClassVar, Literal

from torch import Tensor

from recsys.models.head import Head, Inputs, ModelConfig, Sizes
from recsys.models.tower import MLP, Tower


class DeepConfig(Tower, ModelConfig):
    """An MLP on vectors and dense inputs; features with `linear_only` are not read."""

    paper: ClassVar[str] = "https://arxiv.org/abs/1606.07792"
    linear: ClassVar[bool] = False
    kind: Literal["deep"] = "deep"

    def head(self, sizes: Sizes) -> Head:
        return Deep(self, sizes)


class Deep(Head):
    """logit = MLP(vectors, dense)."""

    def __init__(self, config: DeepConfig, sizes: Sizes) -> None:
        super().__init__()
        self.mlp = MLP(sizes.deep, tower=config, out=len(sizes.tasks))

    def forward(self, inputs: Inputs) -> Tensor:
        logits_BT: Tensor = self.mlp(inputs.deep_BD())
        return logits_BT
