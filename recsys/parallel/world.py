"""The processes that train together, as a value."""

import contextlib
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore, Store

from etl.faults import Fault
from recsys.parallel.alive import COME_WITHIN_S
from recsys.parallel.meeting import meeting

DEAD_AFTER_S = 60.0
_TIMEOUT = timedelta(seconds=COME_WITHIN_S)
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all: rank 0 to size - 1, and the device it computes on."""

    rank: int
    size: int
    device: torch.device


@contextlib.contextmanager
def open_world(device: str, *, dead_after_s: float = DEAD_AFTER_S) -> Iterator[World]:
    """Joins the processes that torchrun started, or stands alone.

    A rank that was not heard of for `dead_after_s` ends the others; one that never comes, or a live one that stays out
    of a collective, does so after 10 minutes. The process group ends with the block also at an error: left open, gloo
    aborts the process.

    Raises:
        Fault: another rank ended; it is named, with its host. Or there is no GPU for this one.
    """
    backend = "nccl" if device == "cuda" else "gloo"
    rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")) if "RANK" in os.environ else (0, 1)
    alone = contextlib.nullcontext[Store](HashStore())
    with meeting(rank, size, dead_after_s=dead_after_s) if size > 1 else alone as store:
        world = World(rank, size, _own_device(device))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
        try:
            yield world
        finally:
            dist.destroy_process_group()


def _own_device(device: str) -> torch.device:
    if device == "cpu":
        return torch.device("cpu")
    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if own.index >= torch.cuda.device_count():
        got, wanted = f"{torch.cuda.device_count()} GPUs on {socket.gethostname()}", "one for each of its ranks"
        remedy = "set train.device = 'cpu', start fewer ranks there, or install torch for CUDA"
        raise Fault("train.device = 'cuda'", got=got, wanted=wanted, remedy=remedy)
    torch.cuda.set_device(own)
    return own


def barrier() -> None:
    """Waits for all ranks."""
    dist.barrier()


def background_group() -> dist.ProcessGroup:
    """A second connection between all ranks, for a thread whose collectives must not mix with training's."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    return group


def from_first(value: T, *, group: dist.ProcessGroup | None = None) -> T:
    """Rank 0's value, on every rank; every rank has to call."""
    values = [value]
    dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


def from_all(value: T, *, group: dist.ProcessGroup | None = None) -> list[T]:
    """Each rank's value, on every rank; every rank has to call."""
    values: list[T] = [value] * dist.get_world_size()
    if len(values) == 1:  # a collective of one rank takes half a millisecond
        return values
    dist.all_gather_object(values, value, group=group)
    return values


def mean_over_ranks(value: Tensor) -> float:
    """The mean of one number a rank; every rank has to call."""
    total, ranks = value.detach().clone(), dist.get_world_size()
    if ranks > 1:
        dist.all_reduce(total)
    return float(total) / ranks


def sum_over_ranks(values: Tensor) -> None:
    """Adds up, in place, the values of all ranks; every rank has to call."""
    dist.all_reduce(values)


def average_buffers(module: nn.Module) -> None:
    """Gives every rank the mean of all ranks' running statistics; every rank has to call."""
    _average(buffer for name, buffer in module.named_buffers() if name.endswith(("running_mean", "running_var")))


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """What DistributedDataParallel does in a backward pass, after several of them."""
    _average(parameter.grad for parameter in parameters if parameter.grad is not None)


def _average(tensors: Iterable[Tensor]) -> None:
    found = list(tensors)
    if not found or dist.get_world_size() == 1:
        return
    flat = torch.cat([tensor.detach().flatten() for tensor in found])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, part in zip(found, torch.split(flat, [tensor.numel() for tensor in found]), strict=True):
        tensor.detach().copy_(part.view_as(tensor))


def gather_rows(own_SBD: Tensor) -> Tensor:
    """Each rank's [S, B, D] of S batches -> the rows of all ranks [ranks x S x B, D], one rank's after the other's."""
    parts = [torch.empty_like(own_SBD) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own_SBD.contiguous())
    return torch.cat(parts).flatten(0, 1)
