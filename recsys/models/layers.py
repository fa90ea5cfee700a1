"""Layers that several heads share."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Activation = Literal["relu", "tanh", "sigmoid", "prelu", "dice", "none"]


class Dropout(nn.Module):
    """In training keeps each value with probability `keep_prob` and divides by it; otherwise changes nothing.

    On CPU a value's fate is 16 bits of torch's generator, which takes a third of the time of torch's own dropout; the
    probability is then the nearest of 65,536.
    """

    def __init__(self, keep_prob: float) -> None:
        super().__init__()
        self.keep_prob = keep_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.keep_prob == 1:
            return x
        if x.device.type != "cpu":
            return nn.functional.dropout(x, 1 - self.keep_prob)
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        kept = min(max(round(self.keep_prob * 2**16), 1), 2**16 - 1) - 2**15
        return x * (draws[: x.numel()].view(x.shape) < kept).to(x.dtype).div_(self.keep_prob)


class Dice(nn.Module):
    """p(x) x + (1 - p(x)) a x with p = sigmoid of the standardised x (Zhou et al. 2018, equation 3): [..., D] -> same.

    `rows` picks the positions that the batch statistics are taken over, [...] of bool; padding must not count.
    """

    def __init__(self, width: int, *, eps: float = 1e-8) -> None:
        super().__init__()
        self.alpha_D = nn.Parameter(torch.zeros(width))
        self.norm = nn.BatchNorm1d(width, eps=eps, momentum=0.1, affine=False)

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        if self.training:
            kept_RD = x.flatten(0, -2) if rows is None else x[rows]
            if kept_RD.shape[0] > 1:
                self.norm(kept_RD.detach())
                mean_D, var_D = kept_RD.mean(dim=0), kept_RD.var(dim=0, correction=0)
            else:
                mean_D, var_D = self.running()
        else:
            mean_D, var_D = self.running()
        p = torch.sigmoid((x - mean_D) / torch.sqrt(var_D + self.norm.eps))
        return p * x + (1 - p) * self.alpha_D * x

    def running(self) -> tuple[Tensor, Tensor]:
        """Mean and variance that training has gathered."""
        mean_D, var_D = self.norm.running_mean, self.norm.running_var
        if mean_D is None or var_D is None:
            raise RuntimeError("batch statistics are not tracked")
        return mean_D, var_D


def activation(name: Activation, width: int) -> nn.Module:
    """The layer of that name for inputs of `width` columns."""
    if name == "prelu":
        return nn.PReLU(width)
    if name == "dice":
        return Dice(width)
    return {"relu": nn.ReLU(inplace=True), "tanh": nn.Tanh(), "sigmoid": nn.Sigmoid(), "none": nn.Identity()}[name]


def batch_norm(width: int) -> nn.BatchNorm1d:
    """eps 1e-3 and decay 0.9, as in the published code of these models."""
    return nn.BatchNorm1d(width, eps=1e-3, momentum=0.1)


def pairs_BK(entries_BEK: Tensor) -> Tensor:
    """Sum over all pairs of entries of their elementwise products, as 1/2 ((sum e)^2 - sum e^2) (Rendle 2010)."""
    sum_BK = entries_BEK.sum(dim=1)
    return 0.5 * (sum_BK * sum_BK - (entries_BEK * entries_BEK).sum(dim=1))


def pair_indices(count: int) -> tuple[Tensor, Tensor]:
    """Both sides of the pairs (0,1), (0,2) .. (1,2) .., int64 [P] each."""
    first_P, second_P = torch.triu_indices(count, count, offset=1)
    return first_P, second_P


def half_squares(weights: Sequence[Tensor]) -> Tensor:
    """Half the sum of squares of all the tensors together (tf.nn.l2_loss)."""
    return 0.5 * torch.stack([weight.square().sum() for weight in weights]).sum()


def init_head(head: nn.Module, generator: torch.Generator) -> None:
    """Glorot uniform weights and zero biases, as in the published code; modules with `init(generator)` do their own."""
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in head.modules():
        own = getattr(module, "init", None)
        if callable(own):
            own(generator)
