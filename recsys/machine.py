"""What a machine can and can't do for a training run."""

import os
import shutil

import torch

from etl.faults import Fault
from recsys.experiment import Train


def check_compiler(settings: Train) -> None:
    """Raises Fault where the dense part is to be compiled for a CPU and there is no C++ compiler."""
    compiler = os.environ.get("CXX", "g++")
    if settings.compile == "inductor" and settings.device == "cpu" and not shutil.which(compiler):
        got, remedy = f"no '{compiler}' on PATH", "install g++, set CXX, or set train.compile = 'none'"
        raise Fault("train.compile", got=got, wanted="a C++ compiler", remedy=remedy)


def slow_precision(settings: Train) -> str | None:
    """A sentence where bf16 will be slower than fp32: on CPUs that have to emulate it."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if settings.precision == "bf16" and settings.device == "cpu" and not fast:
        return "train.precision = 'bf16': this CPU has neither avx512_bf16 nor amx, fp32 will be several times faster"
    return None
