"""Sums of rows that are cut over ranks, on gloo: each rank sends every other one what that one's batch looked up.

gloo knows no reduce-scatter. torch makes one of an all-reduce of the sums for all ranks: twice the bytes, and a copy.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torchrec.distributed.types import Awaitable


class Scatter(nn.Module):
    """In the place of torchrec's `PooledEmbeddingsReduceScatter`, without codecs."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self._group = group

    def forward(self, sums_GD: Tensor, input_splits: Sequence[int]) -> "Scattered":
        """This rank's part of the sums [G, D] for the rows of all ranks, of which rank r has `input_splits[r]`."""
        return Scattered(sums_GD, input_splits, group=self._group)


class Scattered(Awaitable[Tensor]):  # type: ignore[misc]
    """The sums of all ranks for this rank's rows [B, D], on their way. Their gradients go back the same way, as means
    over ranks, which is what torchrec makes of them."""

    def __init__(self, sums_GD: Tensor, rows: Sequence[int], *, group: dist.ProcessGroup) -> None:
        super().__init__()
        self._sums_GD, self.rows, self.group = sums_GD, list(rows), group
        parts = torch.split(sums_GD.detach().contiguous(), self.rows)
        self._own_BD: Tensor = parts[group.rank()]
        self._others = [torch.empty_like(self._own_BD) for _ in parts]
        self._works = _exchange(parts, into=self._others, group=group)

    def _wait_impl(self) -> Tensor:
        return torch.as_tensor(_Sum.apply(self._sums_GD, self))  # type: ignore[no-untyped-call]

    def added(self) -> Tensor:
        """The sums [B, D]."""
        _wait(self._works)
        total_BD = self._own_BD.clone()
        for rank, other_BD in enumerate(self._others):
            if rank != self.group.rank():
                total_BD += other_BD
        return total_BD


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, sums_GD: Tensor, scattered: Scattered) -> Tensor:
        ctx.rows, ctx.group = scattered.rows, scattered.group
        return scattered.added()

    @staticmethod
    def backward(ctx: Any, gradient_BD: Tensor) -> tuple[Tensor, None]:
        gradient_GD = gradient_BD.new_empty(sum(ctx.rows), gradient_BD.shape[1])
        parts, ranks = torch.split(gradient_GD, ctx.rows), ctx.group.size()
        own_BD = parts[ctx.group.rank()]
        torch.div(gradient_BD, ranks, out=own_BD)
        _wait(_exchange([own_BD] * ranks, into=parts, group=ctx.group))
        return gradient_GD, None


def _exchange(parts: Sequence[Tensor], *, into: Sequence[Tensor], group: dist.ProcessGroup) -> list[dist.Work]:
    """Sends `parts[r]` to rank r, whose own comes into `into[r]`; all are contiguous."""
    peers = [rank for rank in range(group.size()) if rank != group.rank()]
    works = [dist.irecv(into[rank], group=group, group_src=rank) for rank in peers]
    works += [dist.isend(parts[rank], group=group, group_dst=rank) for rank in peers]
    return [work for work in works if work is not None]


def _wait(works: Sequence[dist.Work]) -> None:
    for work in works:
        work.wait()
