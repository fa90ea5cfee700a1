"""Linear layers and products that suit the CPU."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

_ALIGNED = 16
_FEW = 4
_ROWS = 8  # whose gradients are added up before those of others
_LARGE = 1 << 20  # outputs that no longer lie in a core's cache


class Linear(nn.Linear):
    """torch's linear layer with a faster gradient of its inputs where their number is odd: [B, D] -> [B, out].

    A matrix product into rows of, say, 429 floats takes up to twice the time of one into rows of 432 on CPU. In a
    compiled training step the bias of a large product in bf16 joins the passes that follow: oneDNN would have it
    written to every row of the outputs before.
    """

    def forward(self, input: Tensor) -> Tensor:
        in_bf16 = _in_compiled_step(self.weight) and torch.is_autocast_enabled("cpu")
        if in_bf16 and self.bias is not None and input.shape[:-1].numel() * self.out_features >= _LARGE:
            product = nn.functional.linear(input, self.weight)
            return torch.as_tensor(_Biased.apply(product, self.bias))  # type: ignore[no-untyped-call]
        plain = not self.training or self.in_features % _ALIGNED == 0 or torch.is_autocast_enabled(input.device.type)
        if plain or input.dim() != 2 or not torch.is_grad_enabled():
            return super().forward(input)
        return torch.as_tensor(_AlignedLinear.apply(input, self.weight, self.bias))  # type: ignore[no-untyped-call]


class FirstOrder(nn.Module):
    """Bias + sum of the id features' own weights + weighted dense inputs: [B, L] and [B, N] -> [B, T].

    The id weights come from the tables and are the same for all tasks; bias and dense weights start at 0.
    """

    def __init__(self, *, dense: int, tasks: int) -> None:
        super().__init__()
        self.bias_T = nn.Parameter(torch.zeros(tasks))
        self.weight_NT = nn.Parameter(torch.zeros(dense, tasks))

    def forward(self, linear_BL: Tensor, dense_BN: Tensor) -> Tensor:
        dense_BT = narrow_product(dense_BN, self.weight_NT.t())
        return self.bias_T + linear_BL.sum(dim=1, keepdim=True) + dense_BT


class Logits(nn.Linear):
    """torch's linear layer for few outputs: [B, D] -> [B, T]."""

    def forward(self, input: Tensor) -> Tensor:
        if _as_sums(self.weight):
            return narrow_product(input, self.weight) + self.bias
        return super().forward(input)


def narrow_product(x_BD: Tensor, weight_TD: Tensor) -> Tensor:
    """x W' for a few outputs, [B, D] and [T, D] -> [B, T].

    A training step that is compiled has it as sums within the passes beside it, in float32; a matrix product would read
    x once more, and write its gradient.
    """
    if _as_sums(weight_TD):
        return (x_BD[:, None] * weight_TD).sum(dim=2)
    return x_BD @ weight_TD.t()


def _as_sums(weight_TD: Tensor) -> bool:
    return _in_compiled_step(weight_TD) and len(weight_TD) <= _FEW


def _in_compiled_step(weight: Tensor) -> bool:
    compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return compiled and weight.device.type == "cpu"


class _Biased(Function):
    """A product [..., E] plus its bias, added in float32. The bias' gradient is a sum over few rows, then over these
    sums: compiled, it reads the gradient [B, E] row by row, where one sum would read it column by column."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, bias_E: Tensor) -> Tensor:
        return (product.float() + bias_E).to(product.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gradient_BE = gradient.flatten(0, -2)
        if len(gradient_BE) % _ROWS == 0:
            gradient_BE = gradient_BE.view(-1, _ROWS, gradient_BE.shape[1]).sum(dim=1, dtype=torch.float32)
        return gradient, gradient_BE.sum(dim=0, dtype=torch.float32)


class _AlignedLinear(Function):
    """x W' + b, whose gradient of x is a view of rows of a multiple of 16 floats."""

    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_BD, weight_ED)
        return nn.functional.linear(x_BD, weight_ED, bias_E)

    @staticmethod
    def backward(ctx: Any, gradient_BE: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x_BD, weight_ED = ctx.saved_tensors
        of_x_BD = None
        if ctx.needs_input_grad[0]:
            padded_ED = nn.functional.pad(weight_ED, (0, -weight_ED.shape[1] % _ALIGNED))
            of_x_BD = (gradient_BE @ padded_ED)[:, : weight_ED.shape[1]]
        of_bias_E = gradient_BE.sum(dim=0) if ctx.needs_input_grad[2] else None
        return of_x_BD, gradient_BE.t() @ x_BD, of_bias_E
