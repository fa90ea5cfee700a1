"""Calls the loops of `loops.py`, without numba where it has compiled them once.

numba takes half a second to load, as long as a small job. What it makes of the loops, a text in LLVM's language, is
kept on disk; llvmlite, on which numba stands, makes machine code of it in some milliseconds.
"""

import ctypes
import hashlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from etl.artifact import cache_dir, write_json

_lock = threading.Lock()
_NARROW = {"scale32": [np.dtype(np.float32)]}  # what a loop takes that has not 64 bits

Texts = dict[str, tuple[str, str]]
"""By loop: the name of its function, and the module that holds it in LLVM's language."""


def call(name: str, *arrays: npt.NDArray[Any]) -> None:
    """Runs a loop on arrays of the types that it says there; other threads run meanwhile."""
    kinds = [array.dtype for array in arrays if array.itemsize != 8]
    if kinds != _NARROW.get(name, []) or not all(array.flags.c_contiguous for array in arrays):
        raise ValueError(f"{name}: {[(array.dtype, array.strides) for array in arrays]}, wanted 64 bits side by side")
    load().functions[name](*(ctypes.c_void_p(array.ctypes.data) for array in arrays))


@dataclass(frozen=True)
class _Loaded:
    functions: Mapping[str, Callable[..., None]]
    engine: llvm.ExecutionEngine
    """Holds the machine code."""


def load() -> _Loaded:
    """The loops in machine code; compiles them where no process has yet."""
    with _lock:
        return _load()


@cache
def _load() -> _Loaded:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    source = Path(__file__).with_name("loops.py").read_bytes()
    key = hashlib.sha256(b"\0".join([source, version("numba").encode(), cpu.encode(), features.encode()])).hexdigest()
    texts = _texts(f"loops-{key[:16]}.json")
    module = llvm.parse_assembly("")
    for _, text in texts.values():
        module.link_in(llvm.parse_assembly(text))
    machine = llvm.Target.from_default_triple().create_target_machine(cpu=cpu, features=features, opt=3, jit=True)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    named = {name: ctypes.CFUNCTYPE(None)(engine.get_function_address(symbol)) for name, (symbol, _) in texts.items()}
    return _Loaded(named, engine)


def _places() -> list[Path]:
    """Where texts are kept, from the first place that can be written."""
    beside = [Path(__file__).parent / "__pycache__"]
    try:
        return [*beside, cache_dir()]
    except RuntimeError:  # a user without a home
        return beside


def _texts(file: str) -> Texts:
    """As they are kept in this file; else compiled, and kept at the first place that can be written."""
    for path in (place / file for place in _places()):
        try:
            return TypeAdapter(Texts).validate_json(path.read_bytes())
        except (OSError, ValidationError):
            continue  # not there, or not whole
    from etl.engines.loops import LOOPS

    texts = {loop.__name__: (loop.native_name, loop.inspect_llvm()) for loop in LOOPS}
    for place in _places():
        try:
            place.mkdir(parents=True, exist_ok=True)
            write_json(place / file, texts)
            break
        except OSError:
            continue
    return texts
