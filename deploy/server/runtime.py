"""The Triton server of the nvidia-pytriton wheel: where its files are and what this Python must have to run them."""

import os
import shutil
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution, version
from pathlib import Path

from etl.artifact import cache_dir
from etl.faults import Fault, Faults

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class Runtime:
    """`backends` is the private backend directory, `library_path` what LD_LIBRARY_PATH must hold."""

    executable: Path
    backends: Path
    library_path: str


def find_runtime() -> Runtime:
    """Raises Faults naming everything this environment lacks."""
    wheel = _wheel()
    tritonserver = Path(str(wheel.locate_file("pytriton/tritonserver")))
    stub = tritonserver / "python_backend_stubs" / PYTHON / _STUB
    libpython = _libpython()
    faults = [fault for fault in (_numpy_fault(), _stub_fault(stub), _libpython_fault(libpython)) if fault]
    if faults or libpython is None:
        raise Faults(faults)
    backend = tritonserver / "backends" / "python"
    sources = (stub, backend / "libtriton_python.so", backend / "triton_python_backend_utils.py")
    return Runtime(
        executable=tritonserver / "bin" / "tritonserver",
        backends=_assemble(cache_dir() / f"triton-{wheel.version}-{sys.implementation.cache_tag}", sources),
        library_path=f"{libpython.parent}:{wheel.locate_file('nvidia_pytriton.libs')}",
    )


def _wheel() -> Distribution:
    try:
        return distribution("nvidia-pytriton")
    except PackageNotFoundError as missing:
        raise Fault(
            sys.prefix,
            got="no package nvidia-pytriton",
            wanted="the wheel that carries tritonserver",
            remedy="pip install nvidia-pytriton==0.7.0",
        ) from missing


def _numpy_fault() -> Fault | None:
    found = version("numpy")
    if int(found.split(".")[0]) < 2:
        return None
    return Fault(
        "numpy",
        got=f"version {found}",
        wanted="a version below 2: Triton 2.51 reads and writes the arrays of numpy 2 wrongly, without an error",
        remedy="pip install 'numpy<2'",
    )


def _stub_fault(stub: Path) -> Fault | None:
    if stub.is_file():
        return None
    versions = sorted((path.name for path in stub.parent.parent.glob("3.*")), key=lambda name: int(name[2:]))
    return Fault(str(stub), got=f"Python {PYTHON}", wanted=f"one of {', '.join(versions)}", remedy="use another Python")


def _libpython() -> Path | None:
    """The shared libpython of the running Python; the stub is linked to it."""
    library_dir = Path(sysconfig.get_config_var("LIBDIR") or "")
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    places = (library_dir, library_dir / multiarch, Path(sys.base_prefix, "lib"))
    return next((path for place in places if (path := place / f"libpython{PYTHON}.so.1.0").is_file()), None)


def _libpython_fault(libpython: Path | None) -> Fault | None:
    if libpython is not None:
        return None
    return Fault(
        str(sysconfig.get_config_var("LIBDIR")),
        got=f"no libpython{PYTHON}.so.1.0",
        wanted="a Python with a shared library: Triton embeds it",
        remedy=f"apt install libpython{PYTHON}, or build Python with --enable-shared, and make the environment anew",
    )


def _assemble(folder: Path, sources: tuple[Path, ...]) -> Path:
    """The backend directory as a copy of the wheel's files: site-packages may be read-only or shared by two Pythons.

    It appears by one rename, so that two servers starting at once both find it whole.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as scratch:
            python_backend = Path(scratch, "backends", "python")
            python_backend.mkdir(parents=True)
            for source in sources:
                _copy(source, python_backend / source.name)
            _rename_unless_there(python_backend.parent, folder)
    except OSError as error:
        raise Fault(
            str(folder), got=str(error), wanted="a folder this user can write", remedy="set XDG_CACHE_HOME to one"
        ) from error
    return folder


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as data, target.open("xb") as copy:
        shutil.copyfileobj(data, copy)
        copy.flush()
        os.fsync(copy.fileno())
    target.chmod(0o755)


def _rename_unless_there(made: Path, folder: Path) -> None:
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():  # another start was faster: its folder is as good
            raise
