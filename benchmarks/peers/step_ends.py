"""When the steps of an optimizer end."""

import time

import torch


def step_ends(optimizer: torch.optim.Optimizer, *, device: str) -> list[float]:
    """Seconds by the clock, one more at the end of each step that comes, once a GPU has done it."""
    ends: list[float] = []

    def note_end(*_: object) -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    optimizer.register_step_post_hook(note_end)
    return ends
