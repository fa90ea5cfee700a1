"""What ranks send each other of looked up rows over gloo: each one exactly what the other's batch needs, once.

In the place of two exchanges of torchrec's. gloo knows no reduce-scatter, so torch makes one of an all-reduce of the
sums for all ranks: twice the bytes, and a copy. And torchrec's all-to-all of whole rows copies them four times a step
more than has to be.
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

    def forward(self, sums_GD: Tensor, input_splits: Sequence[int]) -> "Sent":
        """This rank's part of the sums [G, D] for the rows of all ranks, of which rank r has `input_splits[r]`."""
        return Sent(sums_GD, rows=input_splits, widths=[sums_GD.shape[1]] * len(input_splits), group=self._group)


class AllToAll(nn.Module):
    """In the place of torchrec's `PooledEmbeddingsAllToAll`, without codecs; rank r looks up `widths[r]` columns."""

    def __init__(self, group: dist.ProcessGroup, *, widths: Sequence[int]) -> None:
        super().__init__()
        self._group, self._widths = group, list(widths)

    def forward(self, looked_GD: Tensor, batch_size_per_rank: Sequence[int]) -> "Sent":
        """This rank's columns [G, D] for the rows of all ranks, of which rank r has `batch_size_per_rank[r]`."""
        return Sent(looked_GD, rows=batch_size_per_rank, widths=self._widths, group=self._group, joined=True)


class Sent(Awaitable[Tensor]):  # type: ignore[misc]
    """What all ranks looked up for this rank's rows, on its way: their sum [B, D], or their columns side by side.

    Gradients go back the same way, as means over ranks, which is what torchrec makes of them.
    """

    def __init__(
        self,
        looked_GD: Tensor,
        *,
        rows: Sequence[int],
        widths: Sequence[int],
        group: dist.ProcessGroup,
        joined: bool = False,
    ) -> None:
        super().__init__()
        self.rows, self.widths, self.group, self.joined = rows, widths, group, joined
        self._looked_GD: Tensor | None = looked_GD  # until it has arrived: what waits for the backward pass is small
        parts = torch.split(looked_GD.detach().reshape(sum(rows), self.widths[self.rank]), list(rows))
        self._found = [looked_GD.new_empty(rows[self.rank], width) for width in widths]
        self._found[self.rank] = parts[self.rank]
        self._works = _exchange(parts, into=self._found, group=group)

    @property
    def rank(self) -> int:
        """This rank."""
        return self.group.rank()

    def _wait_impl(self) -> Tensor:
        looked_GD, self._looked_GD = self._looked_GD, None
        return torch.as_tensor(_Arrived.apply(looked_GD, self))  # type: ignore[no-untyped-call]

    def arrived(self) -> Tensor:
        """[B, D], once all of it is here; what this rank has by itself is brought into place meanwhile."""
        (found, works), self._found, self._works = (self._found, self._works), [], []
        own, peers = self.rank, [rank for rank in range(len(found)) if rank != self.rank]
        if not self.joined:
            _wait(works)
            return sum((found[rank] for rank in peers), start=found[own])
        joined_BD = found[own].new_empty(len(found[own]), sum(self.widths))
        columns = torch.split(joined_BD, list(self.widths), dim=1)
        columns[own].copy_(found[own])
        _wait(works)
        for rank in peers:
            columns[rank].copy_(found[rank])
        return joined_BD

    def sent_back(self, gradient_BD: Tensor) -> Tensor:
        """The gradient of what this rank looked up [G, D], from those of what each rank received."""
        own_GD = gradient_BD.new_empty(sum(self.rows), self.widths[self.rank])
        own, ranks = torch.split(own_GD, list(self.rows)), self.group.size()
        if self.joined:
            of_rank = torch.split(gradient_BD, list(self.widths), dim=1)
            means = [own[at] if at == self.rank else part / ranks for at, part in enumerate(of_rank)]
        else:
            of_rank = (gradient_BD,) * ranks
            means = [gradient_BD / ranks] * ranks
        works = _exchange(means, into=own, group=self.group)
        torch.div(of_rank[self.rank], ranks, out=own[self.rank])
        _wait(works)
        return own_GD


class _Arrived(Function):
    @staticmethod
    def forward(ctx: Any, looked_GD: Tensor, sent: Sent) -> Tensor:
        ctx.sent, ctx.shape = sent, looked_GD.shape
        return sent.arrived()

    @staticmethod
    def backward(ctx: Any, gradient_BD: Tensor) -> tuple[Tensor, None]:
        return ctx.sent.sent_back(gradient_BD).view(ctx.shape), None


def _exchange(parts: Sequence[Tensor], *, into: Sequence[Tensor], group: dist.ProcessGroup) -> list[dist.Work]:
    """Sends `parts[r]` to rank r, whose own comes into `into[r]`; all are contiguous, and nothing is sent for none."""
    peers = [rank for rank in range(group.size()) if rank != group.rank()]
    works = [dist.irecv(into[rank], group=group, group_src=rank) for rank in peers if into[rank].numel()]
    works += [dist.isend(parts[rank], group=group, group_dst=rank) for rank in peers if parts[rank].numel()]
    return [work for work in works if work is not None]


def _wait(works: Sequence[dist.Work]) -> None:
    for work in works:
        work.wait()
