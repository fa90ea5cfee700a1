"""Factorization machine (Rendle 2010, https://doi.org/10.1109/ICDM.2010.127)."""

from typing import ClassVar, Literal

from torch import Tensor

from recsys.models.head import Head, Inputs, ModelConfig, Sizes
from recsys.models.layers import pairs_BK
from recsys.models.linear import FirstOrder


class FMConfig(ModelConfig):
    """First-order weights and the inner products of all pairs of vectors; dense inputs have weights alone."""

    paper: ClassVar[str] = "https://doi.org/10.1109/ICDM.2010.127"
    kind: Literal["fm"] = "fm"

    def head(self, sizes: Sizes) -> Head:
        return FM(sizes)


class FM(Head):
    """Equation 1: logit = bias + sum w x + sum over pairs <v_i, v_j> x_i x_j. Pairs are of ids: also within a bag."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.first_order = FirstOrder(dense=sizes.dense, tasks=len(sizes.tasks))

    def forward(self, inputs: Inputs) -> Tensor:
        first_BT = self.first_order(inputs.linear_BL, inputs.dense_BN)
        logits_BT: Tensor = first_BT + pairs_BK(inputs.entries_BEK).sum(dim=1, keepdim=True)
        return logits_BT

    def activation_penalty_B(self, inputs: Inputs, *, l2: float, linear_l2: float) -> Tensor:
        """Half the squares of Xw and of (XV)^2, as in the published code: a fourth power of the summed vectors XV."""
        linear_B = inputs.linear_BL.sum(dim=1)
        vectors_BK = inputs.entries_BEK.sum(dim=1)
        return 0.5 * (linear_l2 * linear_B.square() + l2 * vectors_BK.square().square().sum(dim=1))
