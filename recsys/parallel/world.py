"""The processes that train together, as a value."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """This process among all: rank 0 to size - 1, and the device it computes on."""

    rank: int
    size: int
    device: torch.device


@contextlib.contextmanager
def open_world(device: str) -> Iterator[World]:
    """Joins the processes that torchrun started, or stands alone.

    The process group ends with the block also at an error: left open, gloo aborts the process at exit.
    """
    backend = "nccl" if device == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=_TIMEOUT)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=_TIMEOUT)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), _own_device(device))
    finally:
        dist.destroy_process_group()


def _own_device(device: str) -> torch.device:
    if device == "cpu":
        return torch.device("cpu")
    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(own)
    return own


def barrier() -> None:
    """Waits for all ranks."""
    dist.barrier()


def mean_over_ranks(value: Tensor) -> float:
    """The mean of one number a rank; every rank has to call."""
    total = value.detach().clone()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def gather_steps(own_SBD: Tensor) -> Tensor:
    """Each rank's [S, B, D] of S steps -> all ranks' rows [S x ranks x B, D] in global order, on every rank."""
    parts = [torch.empty_like(own_SBD) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own_SBD.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 2)
