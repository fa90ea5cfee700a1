"""The MLP of most heads, and the settings that go with it."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from torch import Tensor, nn

from etl.spec import Section
from recsys.models.layers import Activation, Dropout, activation, batch_norm
from recsys.models.linear import Linear, Logits

Widths = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1, description="widths of the hidden layers")]
Keep = Annotated[float, Field(gt=0, le=1)]
KeepProb = Annotated[
    Annotated[Keep, Tag("number")] | Annotated[list[Keep], Tag("list")],
    Discriminator(lambda value: "list" if isinstance(value, list) else "number"),
    Field(description="share of each hidden layer's outputs kept in training: one number, or one a layer"),
]
BatchNorm = Literal["none", "before", "after"]


class Tower(Section):
    """Settings of an MLP; models with one inherit them."""

    hidden: Widths = Field([256, 128, 64])
    activation: Activation | list[Activation] = Field("relu", description="one for all hidden layers, or one a layer")
    keep_prob: KeepProb = 1.0
    batch_norm: BatchNorm = Field("none", description="before or after each activation; before: layers have no bias")

    @model_validator(mode="after")
    def _one_a_layer(self) -> "Tower":
        for name in ("activation", "keep_prob"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != len(self.hidden):
                raise ValueError(f"'{name}' has {len(value)} values for {len(self.hidden)} hidden layers")
        return self


class MLP(nn.Module):
    """Hidden layers and, unless `out` is 0, one linear layer without activation: [B, D] -> [B, out].

    A layer is linear, [norm], activation, [norm], [dropout]. `logit_keep` below 1 drops the output too, which only the
    seed's FNN and PNN do.
    """

    def __init__(self, width: int, *, tower: Tower, out: int, logit_keep: float = 1.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        count = len(tower.hidden)
        keeps = tower.keep_prob if isinstance(tower.keep_prob, list) else [tower.keep_prob] * count
        names = tower.activation if isinstance(tower.activation, list) else [tower.activation] * count
        for size, keep, name in zip(tower.hidden, keeps, names, strict=True):
            layers.append(Linear(width, size, bias=tower.batch_norm != "before"))
            if tower.batch_norm == "before":
                layers.append(batch_norm(size))
            layers.append(activation(name, size))
            if tower.batch_norm == "after":
                layers.append(batch_norm(size))
            if keep < 1:
                layers.append(Dropout(keep))
            width = size
        if out:
            layers.append(Logits(width, out))
        if logit_keep < 1:
            layers.append(Dropout(logit_keep))
        self.layers = nn.Sequential(*layers)
        self.width = out or width

    def forward(self, x_BD: Tensor) -> Tensor:
        out_BT: Tensor = self.layers(x_BD)
        return out_BT
