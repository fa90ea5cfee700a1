"""Layers that several heads share."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """ReLU layers with dropout, then one linear layer: [B, D] -> [B, out]."""

    def __init__(self, width: int, *, hidden: Sequence[int], out: int, keep_prob: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for size in hidden:
            layers += [nn.Linear(width, size), nn.ReLU()]
            if keep_prob < 1:
                layers.append(nn.Dropout(1 - keep_prob))
            width = size
        self.layers = nn.Sequential(*layers, nn.Linear(width, out))

    def forward(self, x_BD: Tensor) -> Tensor:
        out_BT: Tensor = self.layers(x_BD)
        return out_BT


class FirstOrder(nn.Module):
    """Bias + sum of the id features' own weights + weighted dense inputs: [B, L] and [B, N] -> [B, T].

    The id weights come from the tables and are the same for all tasks; bias and dense weights start at 0.
    """

    def __init__(self, *, dense: int, tasks: int) -> None:
        super().__init__()
        self.bias_T = nn.Parameter(torch.zeros(tasks))
        self.weight_NT = nn.Parameter(torch.zeros(dense, tasks))

    def forward(self, linear_BL: Tensor, dense_BN: Tensor) -> Tensor:
        return self.bias_T + linear_BL.sum(dim=1, keepdim=True) + dense_BN @ self.weight_NT


def init_linear(head: nn.Module, generator: torch.Generator) -> None:
    """Glorot uniform weights and zero biases, as in the published code of these models."""
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)
