"""Native code of an exported program: AOTInductor, for a named level of x86-64, without any weight inside.

Weights are inputs: as AOTInductor's constants, those of one element would be folded into the code.
"""

import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from torch.export import ExportedProgram

from deploy.served_program import cpu_flags
from etl.faults import Fault

Compile = Literal["auto", "off", "x86-64-v3", "x86-64-v4"]

_V3 = frozenset(["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"])
LEVELS = {"x86-64-v4": _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}, "x86-64-v3": _V3}
_VECTOR_BITS = {"x86-64-v4": 512, "x86-64-v3": 256}


def level_of(wanted: Compile) -> str | None:
    """The level to compile for, None for no native code; "auto" is the highest of this CPU, if there is a compiler.

    Raises:
        Fault: a level was asked for, and there is no compiler, or one that knows no levels, or this CPU could not check
            what it compiles.
    """
    if wanted == "off":
        return None
    from torch._inductor import config

    compiler = os.environ.get("CXX", "g++")
    has_compiler, has_levels = shutil.which(compiler) is not None, hasattr(config.cpp, "march")
    found = next((level for level, needs in LEVELS.items() if needs <= cpu_flags()), None)
    if wanted == "auto":
        return found if has_compiler and has_levels else None
    if not has_levels:
        got, remedy = f"torch {torch.__version__}", "install torch 2.13, or set 'compile' to \"off\""
        raise Fault("export.compile", got=got, wanted="one that compiles for a level", remedy=remedy)
    if not has_compiler:
        remedy = "install g++, or set 'compile' to \"off\""
        raise Fault("export.compile", got=f"no compiler '{compiler}'", wanted="a C++ compiler", remedy=remedy)
    if missing := LEVELS[wanted] - cpu_flags():
        got, remedy = f"a CPU without {', '.join(sorted(missing))}", "export on such a machine, or choose a lower level"
        raise Fault("export.compile", got=got, wanted=f"a CPU of level {wanted}", remedy=remedy)
    return wanted


def compile_program(program: ExportedProgram, path: Path, *, level: str) -> list[str]:
    """Writes the package, about a minute's work; returns the CPU flags that it needs, as `cpu_flags` spells them.

    One thread: a number of threads would be fixed in the code, and an instance of the server has one.
    """
    import torch._inductor
    from torch._inductor import config
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    options: dict[str, Any] = {
        "cpp.march": level,
        "cpp.simdlen": _VECTOR_BITS[level],
        "cpp.threads": 1,
        "aot_inductor.package_constants_in_so": False,
    }
    with config.patch(options), torch.no_grad():
        vector_flags = pick_vec_isa().build_arch_flags().split()
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
    vector = {flag.removeprefix("-m").replace("-", "") for flag in vector_flags if flag.startswith("-m")}
    return sorted(LEVELS[level] | vector)
