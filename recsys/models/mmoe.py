"""Multi-gate Mixture-of-Experts (Ma et al. 2018, https://dl.acm.org/doi/10.1145/3219819.3220007): tasks share MLPs."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.models.head import Head, Inputs, ModelConfig, Sizes
from recsys.models.tower import MLP, Tower


class MMoEConfig(ModelConfig):
    """Experts that all tasks share; each task mixes them by its own gate and has its own tower."""

    paper: ClassVar[str] = "https://dl.acm.org/doi/10.1145/3219819.3220007"
    linear: ClassVar[bool] = False
    kind: Literal["mmoe"] = "mmoe"
    experts: int = Field(8, ge=2, description="MLPs on the inputs")
    expert: Tower = Field(Tower(hidden=[256, 128]), description="one expert")
    tower: Tower = Field(Tower(hidden=[64]), description="one task's MLP on its mixture")

    def head(self, sizes: Sizes) -> Head:
        return MMoE(self, sizes)


class Experts(nn.Module):
    """MLPs side by side: [B, D] -> [B, E, H]; `width` is H."""

    def __init__(self, width: int, *, count: int, tower: Tower) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(MLP(width, tower=tower, out=0) for _ in range(count))
        self.width = tower.hidden[-1]

    def forward(self, x_BD: Tensor) -> Tensor:
        return torch.stack([mlp(x_BD) for mlp in self.mlps], dim=1)


class Gate(nn.Module):
    """Experts weighted by softmax(W x): [B, D] and [B, E, H] -> [B, H]."""

    def __init__(self, width: int, *, experts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, experts, bias=False)

    def forward(self, x_BD: Tensor, experts_BEH: Tensor) -> Tensor:
        weights_BE1: Tensor = self.linear(x_BD).softmax(dim=1)[:, :, None]
        return (weights_BE1 * experts_BEH).sum(dim=1)


class MMoE(Head):
    """Equations 6 and 7: logit of task t = tower_t(sum over experts of gate_t(x) expert(x))."""

    def __init__(self, config: MMoEConfig, sizes: Sizes) -> None:
        super().__init__()
        self.experts = Experts(sizes.deep, count=config.experts, tower=config.expert)
        self.gates = nn.ModuleList(Gate(sizes.deep, experts=config.experts) for _ in sizes.tasks)
        self.towers = nn.ModuleList(MLP(self.experts.width, tower=config.tower, out=1) for _ in sizes.tasks)

    def forward(self, inputs: Inputs) -> Tensor:
        x_BD = inputs.deep_BD()
        experts_BEH = self.experts(x_BD)
        tasks = zip(self.towers, self.gates, strict=True)
        return torch.cat([tower(gate(x_BD, experts_BEH)) for tower, gate in tasks], dim=1)
