"""FNN (Zhang et al. 2016, https://arxiv.org/abs/1601.02376): an MLP on the vectors of a factorization machine."""

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from recsys.models.head import Head, Inputs, ModelConfig, Sizes
from recsys.models.tower import MLP, Tower


class LogitTower(Tower):
    """Settings of the MLP of FNN and PNN, whose published code drops the output logit too."""

    compat: Literal["none", "seed"] = Field(
        "none", description="seed: training drops the logit too; keep_prob may have one more value, the logit's"
    )

    @model_validator(mode="after")
    def _one_a_layer(self) -> "LogitTower":
        for name, more in (("activation", 0), ("keep_prob", 1 if self.compat == "seed" else 0)):
            value = getattr(self, name)
            if isinstance(value, list) and not 0 <= len(value) - len(self.hidden) <= more:
                wanted = "one a layer and one for the logit" if more else "one a layer"
                raise ValueError(f"'{name}' has {len(value)} values for {len(self.hidden)} hidden layers, not {wanted}")
        return self

    def mlp(self, width: int, *, out: int) -> MLP:
        """The MLP [B, width] -> [B, out]; "seed" with one number drops the logit as it does the layers."""
        layers, logit = self.keep_prob, 1.0
        if isinstance(layers, list):
            layers, rest = layers[: len(self.hidden)], layers[len(self.hidden) :]
            logit = rest[0] if rest else 1.0
        elif self.compat == "seed":
            logit = layers
        return MLP(width, tower=self.model_copy(update={"keep_prob": layers}), out=out, logit_keep=logit)


class FNNConfig(LogitTower, ModelConfig):
    """An MLP on vectors and dense inputs that may start from a trained FM; `linear_only` features are not read."""

    paper: ClassVar[str] = "https://arxiv.org/abs/1601.02376"
    kind: Literal["fnn"] = "fnn"
    include_linear: bool = Field(
        False, description="the first layer also sees each field's first-order weight, as in the paper"
    )
    init_from_fm: str | None = Field(None, min_length=1, description="run folder of a trained FM: tables start as its")

    @property
    def linear(self) -> bool:  # type: ignore[override]  # the other models' is a constant of the class
        """First-order weights are read only where the first layer sees them."""
        return self.include_linear

    def head(self, sizes: Sizes) -> Head:
        return FNN(self, sizes)


class FNN(Head):
    """Equations 1 to 5: logit = MLP(z, dense), z_i = v_i or, with `include_linear`, (w_i, v_i) of field i."""

    def __init__(self, config: FNNConfig, sizes: Sizes) -> None:
        super().__init__()
        self.fields = len(sizes.fields) if config.include_linear else 0
        self.mlp = config.mlp(sizes.deep + self.fields, out=len(sizes.tasks))

    def forward(self, inputs: Inputs) -> Tensor:
        fields_BFD = inputs.emb_BFK
        if self.fields:
            fields_BFD = torch.cat([inputs.linear_BL[:, : self.fields, None], fields_BFD], dim=2)
        logits_BT: Tensor = self.mlp(torch.cat([fields_BFD.flatten(1), inputs.dense_BN], dim=1))
        return logits_BT

    def activation_penalty_B(self, inputs: Inputs, *, l2: float, linear_l2: float) -> Tensor:
        """Half the squares of what the first layer sees: each field's vector and its weight."""
        vectors_B = super().activation_penalty_B(inputs, l2=l2, linear_l2=0.0)
        return vectors_B + 0.5 * linear_l2 * inputs.linear_BL[:, : self.fields].square().sum(dim=1)
