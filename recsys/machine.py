"""What a machine is slow at, and what makes it faster."""

import ctypes

import torch

from recsys.experiment import Train
from recsys.parallel.kernels import library

_MALLOC = {-1: 512 << 20, -3: 128 << 20, -8: 1}
"""malloc.h: M_TRIM_THRESHOLD, so much may lie free; M_MMAP_THRESHOLD, from this size on memory goes back at once;
M_ARENA_MAX, threads share one heap."""


def slow_precision(settings: Train) -> str | None:
    """A sentence where bf16 will be slower than fp32: on CPUs that have to emulate it."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if settings.precision == "bf16" and settings.device == "cpu" and not fast:
        return "train.precision = 'bf16': this CPU has neither avx512_bf16 nor amx, fp32 will be several times faster"
    return None


def slow_tables(settings: Train) -> str | None:
    """A sentence where FBGEMM will look up tables on one core of a CPU."""
    if settings.device == "cpu" and library() is None:
        remedy = "with a C compiler that has OpenMP ($CC), 'pip install --no-deps --no-build-isolation -e .' makes them"
        return f"tables: recsys/parallel/kernels.c was not compiled, so one core looks rows up: slower; {remedy}"
    return None


def give_back_memory() -> None:
    """Gives the kernel what the C library kept, where that is glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_memory() -> None:
    """Lets the C library keep what tensors give back for the next ones of their size, instead of the kernel.

    A step's tensors are made anew each time. Memory that the kernel gives is cleared page by page, a few thousand pages
    a step: 3 to 25 ms of it on a virtual machine. Only glibc knows `mallopt`; elsewhere nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, size_bytes in _MALLOC.items():
            mallopt(parameter, size_bytes)
