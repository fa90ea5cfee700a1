"""MaskNet (Wang et al. 2021, https://arxiv.org/abs/2102.07619): masks from the inputs multiply the hidden layers."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.models.head import Head, Inputs, ModelConfig, Sizes
from recsys.models.tower import MLP, Tower


class MaskNetConfig(Tower, ModelConfig):
    """Blocks whose inputs are multiplied by a mask of all vectors and dense inputs, then an MLP."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2102.07619"
    linear: ClassVar[bool] = False
    kind: Literal["masknet"] = "masknet"
    structure: Literal["parallel", "serial"] = Field("parallel", description="blocks on the vectors, or on each other")
    blocks: int = Field(3, ge=1, description="number of mask blocks")
    block_width: int = Field(64, ge=1, description="outputs of one block")
    reduction: float = Field(2.0, gt=0, description="inner width of a mask's MLP, as a multiple of the mask's width")
    hidden: list[Annotated[int, Field(ge=1)]] = Field(
        [64], description="widths of the MLP on the blocks; empty: none, as in the paper's serial network"
    )

    def head(self, sizes: Sizes) -> Head:
        return MaskNet(self, sizes)


class MaskNet(Head):
    """Parallel: logit = MLP(all blocks on the normalised vectors). Serial: logit = MLP(last of a chain of blocks)."""

    def __init__(self, config: MaskNetConfig, sizes: Sizes) -> None:
        super().__init__()
        self.serial = config.structure == "serial"
        self.gain_FK = nn.Parameter(torch.ones(len(sizes.fields), sizes.dim))
        self.bias_FK = nn.Parameter(torch.zeros(len(sizes.fields), sizes.dim))
        self.blocks = nn.ModuleList(
            MaskBlock(sizes.deep, width=config.block_width if at and self.serial else sizes.deep, config=config)
            for at in range(config.blocks)
        )
        width = config.block_width * (1 if self.serial else config.blocks)
        self.deep = MLP(width, tower=config, out=len(sizes.tasks))

    def forward(self, inputs: Inputs) -> Tensor:
        x_BD = inputs.deep_BD()
        hidden_BD = inputs._replace(emb_BFK=self._normalised(inputs.emb_BFK)).deep_BD()
        if self.serial:
            for block in self.blocks:
                hidden_BD = block(x_BD, hidden_BD)
        else:
            hidden_BD = torch.cat([block(x_BD, hidden_BD) for block in self.blocks], dim=1)
        logits_BT: Tensor = self.deep(hidden_BD)
        return logits_BT

    def _normalised(self, emb_BFK: Tensor) -> Tensor:
        """Layer normalisation of each vector, with gains and biases of each field."""
        return nn.functional.layer_norm(emb_BFK, emb_BFK.shape[2:]) * self.gain_FK + self.bias_FK


class MaskBlock(nn.Module):
    """relu(norm(W (mask * hidden))), mask = W2 relu(W1 x + b1) + b2: [B, width] -> [B, out].

    The paper's MaskBlock. The mask comes from the inputs x [B, D] as they are, in every block.
    """

    def __init__(self, inputs: int, *, width: int, config: MaskNetConfig) -> None:
        super().__init__()
        inner = max(1, round(width * config.reduction))
        self.mask = nn.Sequential(nn.Linear(inputs, inner), nn.ReLU(), nn.Linear(inner, width))
        self.hidden = nn.Linear(width, config.block_width, bias=False)
        self.norm = nn.LayerNorm(config.block_width)

    def forward(self, x_BD: Tensor, hidden_BD: Tensor) -> Tensor:
        return torch.relu(self.norm(self.hidden(self.mask(x_BD) * hidden_BD)))
