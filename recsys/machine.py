"""What a machine is slow at."""

import torch

from recsys.experiment import Train


def slow_precision(settings: Train) -> str | None:
    """A sentence where bf16 will be slower than fp32: on CPUs that have to emulate it."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if settings.precision == "bf16" and settings.device == "cpu" and not fast:
        return "train.precision = 'bf16': this CPU has neither avx512_bf16 nor amx, fp32 will be several times faster"
    return None
