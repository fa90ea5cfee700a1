"""Progressive Layered Extraction (Tang et al. 2020, https://dl.acm.org/doi/10.1145/3383313.3412236)."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.models.head import Head, Inputs, ModelConfig, Sizes
from recsys.models.mmoe import Experts, Gate
from recsys.models.tower import MLP, Tower


class PLEConfig(ModelConfig):
    """Levels of experts, some shared and some of one task alone, mixed by gates; then each task's own tower."""

    paper: ClassVar[str] = "https://dl.acm.org/doi/10.1145/3383313.3412236"
    linear: ClassVar[bool] = False
    kind: Literal["ple"] = "ple"
    levels: int = Field(2, ge=1, description="levels of experts, one after the other; 1 is the paper's CGC")
    shared_experts: int = Field(4, ge=1, description="experts of a level that all tasks read")
    task_experts: int = Field(4, ge=1, description="experts of a level for each task alone")
    expert: Tower = Field(Tower(hidden=[256, 128]), description="one expert")
    tower: Tower = Field(Tower(hidden=[64]), description="one task's MLP on its last mixture")

    def head(self, sizes: Sizes) -> Head:
        return PLE(self, sizes)


class Level(nn.Module):
    """Equations 1 to 6: what each task and the shared experts read, T + 1 of [B, D] -> T + 1 of [B, H].

    A task's gate weighs its own experts and the shared ones, the shared gate all of them. The last level has no shared
    gate, and gives T.
    """

    def __init__(self, width: int, *, tasks: int, last: bool, config: PLEConfig) -> None:
        super().__init__()
        counts = [config.task_experts] * tasks + [config.shared_experts]
        self.experts = nn.ModuleList(Experts(width, count=count, tower=config.expert) for count in counts)
        weighed = [config.task_experts + config.shared_experts] * tasks + ([] if last else [sum(counts)])
        self.gates = nn.ModuleList(Gate(width, experts=count) for count in weighed)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        *own, shared_BEH = [experts(x_BD) for experts, x_BD in zip(self.experts, inputs, strict=True)]
        read = [torch.cat([own_BEH, shared_BEH], dim=1) for own_BEH in own]
        read.append(torch.cat([*own, shared_BEH], dim=1))
        return [gate(x_BD, experts) for gate, x_BD, experts in zip(self.gates, inputs, read, strict=False)]


class PLE(Head):
    """Equation 7: logit of task t = tower_t(the last level's mixture for t); the first level reads the same for all."""

    def __init__(self, config: PLEConfig, sizes: Sizes) -> None:
        super().__init__()
        tasks, last = len(sizes.tasks), config.levels - 1
        widths = [sizes.deep] + [config.expert.hidden[-1]] * config.levels
        self.levels = nn.ModuleList(
            Level(widths[at], tasks=tasks, last=at == last, config=config) for at in range(config.levels)
        )
        self.towers = nn.ModuleList(MLP(widths[-1], tower=config.tower, out=1) for _ in sizes.tasks)

    def forward(self, inputs: Inputs) -> Tensor:
        read = [inputs.deep_BD()] * (len(self.towers) + 1)
        for level in self.levels:
            read = level(read)
        return torch.cat([tower(mixed_BH) for tower, mixed_BH in zip(self.towers, read, strict=True)], dim=1)
