#!/usr/bin/env python3
"""Make `.venv`: torch, the locked packages and the project itself. `make setup` runs this.

Standard library only, and kept to the syntax of Python 3.6 so that an old interpreter gets as far as
saying that it is too old. Everything the set-up needs is checked before the first byte is written, and
all that is missing is reported at once. Exit codes: 0 done or current, 1 a step failed, 2 the machine
lacks something.
"""

import argparse
import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Dict, Iterator, List, Sequence, Tuple

from preflight import Interpreter, choose_interpreter, machine_faults, probe, report

ROOT = Path(__file__).resolve().parent.parent
LOG_TAIL_LINES = 25

# Of the user's pip settings only those that say where packages come from may steer the install; others
# (PIP_TARGET, PIP_USER, PIP_REQUIRE_HASHES, PIP_NO_DEPS, ...) would send it astray.
PIP_SOURCE_SETTINGS = {
    "PIP_CACHE_DIR",
    "PIP_CERT",
    "PIP_CLIENT_CERT",
    "PIP_CONFIG_FILE",
    "PIP_DEFAULT_TIMEOUT",
    "PIP_EXTRA_INDEX_URL",
    "PIP_FIND_LINKS",
    "PIP_INDEX_URL",
    "PIP_KEYRING_PROVIDER",
    "PIP_NO_CACHE_DIR",
    "PIP_NO_INDEX",
    "PIP_PROXY",
    "PIP_RETRIES",
    "PIP_TIMEOUT",
    "PIP_TRUSTED_HOST",
}
# These would change what the new interpreter sees, or keep it from writing bytecode.
DROPPED_SETTINGS = {"PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "PYTHONSTARTUP", "VIRTUAL_ENV"}


class StepFailed(Exception):
    """A step of the installation returned an error; its output is in the log."""


def digest(root: Path, version: str) -> str:
    """What an environment was made from; it is current while this equals the stamp in it."""
    pyproject = (root / "pyproject.toml").read_text()
    parts = [
        (root / "requirements/cpu.lock").read_bytes(),
        (root / "requirements/torch.txt").read_bytes(),
        re.split(r"(?m)^\[tool\.", pyproject)[0].encode(),
        (root / "recsys/parallel/kernels.c").read_bytes(),
        "".join(re.findall(r"(?ms)^\[\[tool\.setuptools\.ext-modules\]\].*?(?=^\[)", pyproject)).encode(),
        version.encode(),
        str(root).encode(),
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def is_current(root: Path) -> bool:
    """Whether .venv is whole, made from the present files, and of the version of $PYTHON where that is set."""
    venv = root / ".venv"
    try:
        stamp = (venv / ".stamp").read_text()
        found = re.search(r"(?m)^version *= *(\S+)", (venv / "pyvenv.cfg").read_text())
    except OSError:
        return False
    if not found or not (venv / "bin/python").exists():  # exists() follows the link: a removed base Python shows
        return False
    version = found.group(1)
    if os.environ.get("PYTHON"):
        wanted = probe(os.environ["PYTHON"])
        version = wanted.version if wanted else ""
    return stamp == digest(root, version)


def child_environment() -> Dict[str, str]:
    """The user's environment without what would lead pip or the new interpreter astray."""
    dropped = DROPPED_SETTINGS | {name for name in os.environ if name.startswith("PIP_")} - PIP_SOURCE_SETTINGS
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    env["PIP_USER"] = "0"  # overrides `user = true` in a pip.conf
    return env


@contextlib.contextmanager
def progress(name: str) -> Iterator[None]:
    """One line a step: a running clock on a terminal, else the name at once and the seconds at the end."""
    start = time.monotonic()
    done = threading.Event()
    label = "  %-28s" % name

    def tick() -> None:
        while not done.wait(0.2):
            sys.stdout.write("\r%s %5.0f s" % (label, time.monotonic() - start))
            sys.stdout.flush()

    sys.stdout.write(label)
    sys.stdout.flush()
    clock = threading.Thread(target=tick, daemon=True)
    if sys.stdout.isatty():
        clock.start()
    outcome = " failed\n"
    try:
        yield
        outcome = "\n"
    finally:
        done.set()
        if clock.ident:
            clock.join()
            sys.stdout.write("\r" + label)
        sys.stdout.write(" %5.1f s%s" % (time.monotonic() - start, outcome))
        sys.stdout.flush()


def call(command: Sequence[str], log: Path) -> None:
    """Run one command with its output in the log. Raises StepFailed."""
    with log.open("ab") as out:
        out.write(("\n$ %s\n" % " ".join(command)).encode())
        out.flush()
        # close_fds: the command inherits the lock of only_one().
        code = subprocess.call(
            list(command), stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=child_environment(), close_fds=False
        )
    if code:
        raise StepFailed("%s: exit code %d" % (" ".join(command[:6]), code))


def steps(root: Path, python: str) -> Iterator[Tuple[str, List[str]]]:
    """The installation, in order: what to call each step, and its command."""
    venv = root / ".venv"
    # -I: neither the working folder nor the user's own site-packages may shadow what is installed.
    pip = [str(venv / "bin/python"), "-I", "-m", "pip", "--no-input", "--disable-pip-version-check"]
    install = pip + ["install", "--progress-bar", "off", "--no-compile"]
    requirements = root / "requirements"
    lock = requirements / "cpu.lock"
    pinned = len(re.findall(r"(?m)^[\w.-]+==", lock.read_text()))
    yield "virtual environment", [python, "-I", "-m", "venv", str(venv)]
    yield "torch", install + ["-r", str(requirements / "torch.txt")]
    yield "%d locked packages" % pinned, install + ["--no-deps", "--require-hashes", "-r", str(lock)]
    yield "rankforge", install + ["--no-deps", "--no-build-isolation", "--editable", str(root)]
    # On all cores, which is faster than pip's own way. Imports then stay quick where Python may not write
    # bytecode. Some packages ship templates that are no Python: hence no failure here.
    compile_all = "import compileall, sys; compileall.compile_dir(sys.argv[1], quiet=2, workers=0)"
    yield "bytecode", [str(venv / "bin/python"), "-I", "-c", compile_all, str(venv / "lib")]


def build(root: Path, interpreter: Interpreter) -> None:
    """Make .venv afresh; the stamp comes last, so that a broken attempt is never taken for a whole one.

    Raises StepFailed.
    """
    venv = root / ".venv"
    if venv.is_symlink():
        venv.unlink()
    elif venv.exists():
        shutil.rmtree(str(venv))
    venv.mkdir()
    for compiled in (root / "recsys/parallel").glob("_kernels*.so"):
        compiled.unlink()  # where they can't be compiled anew, none is better than old ones
    for name, command in steps(root, interpreter.executable):
        with progress(name):
            call(command, venv / "setup.log")
    beside = venv / ".stamp.new"
    beside.write_text(digest(root, interpreter.version))
    beside.rename(venv / ".stamp")


@contextlib.contextmanager
def only_one(root: Path) -> Iterator[None]:
    """Wait until no other set-up of this folder runs. The lock goes with its process, however that ends.

    Commands inherit it: a pip that outlives a killed set-up still keeps the next one waiting.
    """
    with (root / ".setup.lock").open("a") as lock:
        os.set_inheritable(lock.fileno(), True)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("set-up: waiting for another set-up of this folder to end", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def set_up(root: Path, check_only: bool) -> int:
    """Check the machine, then build what is missing. Returns the exit code."""
    interpreter, faults = choose_interpreter()
    faults = faults + machine_faults(root)
    if faults or interpreter is None:
        print(report(faults), file=sys.stderr)
        return 2
    if check_only:
        print("set-up: nothing is missing; Python %s at %s" % (interpreter.version, interpreter.executable))
        return 0
    with only_one(root):
        if is_current(root):
            return 0
        print("set-up: .venv with Python %s" % interpreter.version, flush=True)
        try:
            build(root, interpreter)
        except StepFailed as failure:
            print(failure_text(root / ".venv/setup.log", failure), file=sys.stderr)
            return 1
    return 0


def failure_text(log: Path, failure: StepFailed) -> str:
    """The end of the log, and what to do."""
    tail = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    remedy = "see above; the next run starts afresh (is the package index within reach, and the disk not full?)"
    return "\n".join(tail + ["", "set-up: %s, wanted 0: %s" % (failure, remedy), "whole log: %s" % log])


def main() -> int:
    """Parse the command line and run. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Make .venv: torch, the locked packages and the project itself.")
    parser.add_argument("--check", action="store_true", help="only say what this machine lacks")
    arguments = parser.parse_args()
    if not arguments.check and is_current(ROOT):
        return 0
    try:
        return set_up(ROOT, arguments.check)
    except KeyboardInterrupt:
        print("\nset-up: interrupted; the next run starts afresh", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
