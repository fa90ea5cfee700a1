"""The dense part of training as one program, which torch makes of it."""

import os
import shutil
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from etl.faults import Fault
from recsys.network import Network, Scored


def compile_dense(network: Network, *, device: str) -> None:
    """Lets a network in training run its dense part as a program of the same results within rounding.

    It is made at the first step and stays: all batches of training are of one shape. A head whose shapes depend on what
    a batch holds, as DIN's do, becomes several programs within its first steps. Evaluation runs as before.

    Raises:
        Fault: on CPU, no C++ compiler or no headers of Python.
    """
    if device == "cpu":
        _require_compiler()
    program = torch.compile(network.score_rows)

    def run(rows_BD: Tensor, *, ids_BS: Tensor, floats_BN: Tensor) -> Scored:
        chosen = program if network.training else network.score_rows
        return chosen(rows_BD, ids_BS=ids_BS, floats_BN=floats_BN)

    network.program = run


def _require_compiler() -> None:
    compiler = os.environ.get("CXX", "g++")
    header = Path(sysconfig.get_path("include"), "Python.h")
    missing = [] if shutil.which(compiler) else [f"no C++ compiler '{compiler}'"]
    missing += [] if header.is_file() else [f"no {header}"]
    if missing:
        wanted = "a C++ compiler and the headers of Python"
        remedy = "install them (Debian: g++ and python3-dev), or drop the setting"
        raise Fault("train.compile", got=", ".join(missing), wanted=wanted, remedy=remedy)
