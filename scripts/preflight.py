"""What the machine must offer before `.venv` is made: a fitting Python, platform, compiler and disk.

Standard library only, in the syntax of Python 3.6: scripts/setup.py runs this on whatever Python there is.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

PYTHON_VERSIONS = ("3.11", "3.12")
WANTED_PYTHON = "Python " + " or ".join(PYTHON_VERSIONS)
PYTHON_REMEDY = "install one, or name it: make setup PYTHON=/path/to/python3.11"
MIN_GLIBC = (2, 35)
CPU_BUILD_GB = 3
CUDA_BUILD_GB = 8
PROBE_TIMEOUT_S = 20

# Runs inside each candidate interpreter, so it may use only what every Python 3 has.
PROBE = """
import importlib, json, os, sys, sysconfig
def importable(name):
    try:
        importlib.import_module(name)
        return True
    except ImportError:
        return False
libdir, soname = sysconfig.get_config_var("LIBDIR") or "", sysconfig.get_config_var("INSTSONAME") or ""
print(json.dumps({
    "version": "%d.%d.%d" % sys.version_info[:3],
    "executable": getattr(sys, "_base_executable", sys.executable),
    "lacks": [name for name in ("venv", "ensurepip") if not importable(name)],
    "libpython": os.path.join(libdir, soname),
    "shared": ".so" in soname and os.path.exists(os.path.join(libdir, soname)),
    "headers": os.path.join(sysconfig.get_paths()["include"], "Python.h"),
}))
"""


class Fault(NamedTuple):
    """One thing that is missing: where, what came, what was wanted, and what to do about it."""

    place: str
    got: str
    wanted: str
    remedy: str


class Interpreter(NamedTuple):
    """A Python that runs, and what it lacks."""

    executable: str
    version: str
    faults: List[Fault]


def probe(python: str) -> Optional[Interpreter]:
    """Ask `python` what it is; None if it does not run (a pyenv shim can exist and still fail)."""
    try:
        done = subprocess.run(
            [python, "-I", "-c", PROBE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=PROBE_TIMEOUT_S
        )
        facts = json.loads(done.stdout.decode())
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return Interpreter(facts["executable"], facts["version"], interpreter_faults(python, facts))


def interpreter_faults(python: str, facts: Dict[str, object]) -> List[Fault]:
    """What the interpreter described by `facts` (the output of PROBE) lacks."""
    version = str(facts["version"])
    short = ".".join(version.split(".")[:2])
    if short not in PYTHON_VERSIONS:
        return [Fault(python, "Python " + version, WANTED_PYTHON, PYTHON_REMEDY)]
    faults = []
    if facts["lacks"]:
        got = "no module " + ", ".join(map(str, facts["lacks"]))  # type: ignore[call-overload]
        faults.append(Fault(python, got, "venv and ensurepip", "on Debian: apt install python%s-venv" % short))
    if not facts["shared"]:
        remedy = "on Debian: apt install libpython%s; with pyenv: PYTHON_CONFIGURE_OPTS=--enable-shared" % short
        faults.append(Fault(python, "no %s" % facts["libpython"], "a shared libpython, for Triton's stub", remedy))
    if not os.path.exists(str(facts["headers"])):
        remedy = "on Debian: apt install libpython%s-dev" % short
        faults.append(Fault(python, "no %s" % facts["headers"], "Python's headers, for torch.compile", remedy))
    return faults


def candidates() -> Iterator[str]:
    """Interpreters in order of preference: $PYTHON alone if set, else the running one, then those on PATH."""
    if os.environ.get("PYTHON"):
        yield os.environ["PYTHON"]
        return
    yield sys.executable
    for version in PYTHON_VERSIONS:
        for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
            path = os.path.join(folder, "python" + version)
            if os.access(path, os.X_OK):
                yield path


def choose_interpreter() -> Tuple[Optional[Interpreter], List[Fault]]:
    """The first interpreter that lacks nothing; else None and the faults of the one that lacks least."""
    tried = []  # type: List[str]
    nearest = None  # type: Optional[Interpreter]
    for python in candidates():
        found = probe(python)
        tried.append(python)
        if found and not found.faults:
            return found, []
        if found and (nearest is None or rank(found) < rank(nearest)):
            nearest = found
    if nearest is None:
        return None, [Fault(", ".join(tried), "nothing that runs", WANTED_PYTHON, PYTHON_REMEDY)]
    return None, nearest.faults


def rank(found: Interpreter) -> Tuple[bool, int]:
    """Sorts interpreters by how little they lack: a right version first, then fewer faults."""
    return found.version.rpartition(".")[0] not in PYTHON_VERSIONS, len(found.faults)


def machine_faults(root: Path) -> List[Fault]:
    """What the machine lacks, whichever interpreter is used."""
    faults = []
    machine = "%s %s" % (os.uname().sysname, os.uname().machine)
    if machine != "Linux x86_64":
        faults.append(Fault("machine", machine, "Linux x86_64", "the Triton wheel exists for this platform only"))
    libc = libc_version()
    if tuple(int(n) for n in re.findall(r"\d+", libc)[:2]) < MIN_GLIBC:
        wanted = "glibc >= %d.%d" % MIN_GLIBC
        faults.append(Fault("C library", libc, wanted, "Debian 12, Ubuntu 22.04 or newer has it"))
    compiler = os.environ.get("CXX") or "g++"
    if not shutil.which(compiler):
        remedy = "on Debian: apt install g++; or set CXX"
        faults.append(Fault("C++ compiler", "no %s on PATH" % compiler, "one, to compile the served model", remedy))
    free_gb = shutil.disk_usage(str(root)).free / 1e9
    if free_gb < CPU_BUILD_GB:
        wanted = "%d GB, or %d GB where pip finds the CUDA build of torch" % (CPU_BUILD_GB, CUDA_BUILD_GB)
        faults.append(Fault("disk at %s" % root, "%.1f GB free" % free_gb, wanted, "free some space"))
    if not os.access(str(root), os.W_OK):
        faults.append(Fault(str(root), "a folder that can't be written", "to make .venv in it", "check its owner"))
    return faults


def libc_version() -> str:
    """Name and version of the C library; 'not glibc' on musl and elsewhere."""
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return os.confstr("CS_GNU_LIBC_VERSION") or "not glibc"
    return "not glibc"


def report(faults: Sequence[Fault]) -> str:
    """All faults as one text."""
    lines = ["set-up: this machine lacks %d thing%s" % (len(faults), "s" if len(faults) > 1 else "")]
    return "\n".join(lines + ["  %s: got %s, wanted %s: %s" % fault for fault in faults])
