"""Where the time of a step goes: a stopwatch whose laps add up to the whole."""

import time
from typing import Any

import psutil
import torch
from torch import Tensor, nn

OWN_WORK = ("forward", "backward", "dense")
"""Laps in which a rank waits for no other one."""


class Clock:
    """Adds the time since the last lap to a name. On CUDA that is the time to launch, not to compute."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """The time since the last lap went into this."""
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now

    def read(self) -> dict[str, float]:
        """Seconds by name since the last reading."""
        found, self._seconds = self._seconds, {}
        return found

    def watch(self, *, tables: nn.Module, looked_up: nn.Module) -> None:
        """Laps where a training step goes from tables to head and back.

        "forward" ends before the lookup, "backward" at the looked up rows; what comes after that is "sparse", where
        gradients go to the ranks that hold the rows. What several ranks wait in a lookup is "comm" (`IdsAhead`).
        """
        tables.register_forward_pre_hook(self._at_tables)
        looked_up.register_forward_pre_hook(self._at_looked_up)

    def _at_tables(self, module: nn.Module, given: Any) -> None:
        if module.training:
            self.lap("forward")

    def _at_looked_up(self, module: nn.Module, given: tuple[Tensor]) -> None:
        if not module.training:
            return
        self.lap("lookup")
        if given[0].requires_grad:
            given[0].register_hook(self._at_rows)  # type: ignore[no-untyped-call]

    def _at_rows(self, gradient: Tensor) -> None:
        self.lap("backward")


def milliseconds(laps: dict[str, float], *, steps: int) -> dict[str, float]:
    """`ms/<lap>`: the mean over steps."""
    return {f"ms/{name}": round(1000 * seconds / max(steps, 1), 4) for name, seconds in laps.items()}


def own_work(laps: dict[str, float]) -> float:
    """Seconds in which this rank waited for no other one."""
    return sum(laps.get(name, 0.0) for name in OWN_WORK)


def memory_gb() -> float:
    """Resident memory of this process in GB."""
    return float(psutil.Process().memory_info().rss) / 1e9


def gpu_memory_gb(device: torch.device) -> float:
    """The most that torch's tensors have taken of a GPU at once so far, in GB; 0 on the CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
