"""Where the queries of the polars engine run: on the CPU, or on a GPU through cudf-polars."""

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Literal

import polars as pl

from etl.faults import Fault

Device = Literal["cpu", "cuda"]


def check_device(device: Device) -> None:
    """Raises Fault where `cuda` is asked for and cudf-polars or a GPU is missing."""
    if device == "cpu":
        return
    remedy = 'set device = "cpu"'
    if find_spec("cudf_polars") is None:
        remedy = f"run the ETL in an environment that has it (docs/etl.md), or {remedy}"
        raise Fault("etl.device", got="no cudf-polars", wanted="it for polars on cuda", remedy=remedy)
    if not gpus():
        raise Fault("etl.device", got="no CUDA device", wanted='one for device = "cuda"', remedy=remedy)


@contextlib.contextmanager
def queries_on(device: Device) -> Iterator[None]:
    """Every `collect()` streams on all cores, or runs on the GPU; what that can't do, on a core."""
    with pl.Config(engine_affinity="gpu" if device == "cuda" else "streaming"):
        yield


def gpus() -> int:
    """CUDA devices that the driver finds."""
    import pynvml  # a need of cudf-polars

    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return 0
