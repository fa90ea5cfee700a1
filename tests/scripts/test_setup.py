"""The set-up: what it checks, what it leaves behind when it fails."""

import ast
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import preflight
import setup

ROOT = Path(__file__).resolve().parents[2]
WHOLE = {
    "version": "3.11.7",
    "executable": "/opt/python3.11",
    "lacks": [],
    "libpython": "/opt/libpython3.11.so.1.0",
    "shared": True,
    "headers": __file__,  # any file that exists
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files that the set-up reads, with a whole Python named by $PYTHON."""
    root = tmp_path / "project"
    shutil.copytree(ROOT / "requirements", root / "requirements")
    shutil.copy(ROOT / "pyproject.toml", root)
    shutil.copytree(ROOT / "recsys/parallel", root / "recsys/parallel", ignore=shutil.ignore_patterns("*.py", "_*"))
    monkeypatch.setenv("PYTHON", fake_python(tmp_path / "python3.11", WHOLE))
    monkeypatch.setattr(setup, "machine_faults", lambda root: [])
    return root


def fake_python(path: Path, facts: dict[str, object]) -> str:
    """An executable that answers the probe with `facts`."""
    return script(path, f"echo '{json.dumps(facts)}'")


def script(path: Path, body: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def steps_of(*bodies: str) -> object:
    """Stands in for setup.steps: makes a .venv that looks real, then runs each shell line in it."""
    made = "mkdir .venv/bin && ln -s /bin/sh .venv/bin/python && echo 'version = 3.11.7' > .venv/pyvenv.cfg"

    def steps(root: Path, python: str) -> list[tuple[str, list[str]]]:
        return [(f"step {n}", ["sh", "-c", f"cd '{root}' && {body}"]) for n, body in enumerate([made, *bodies])]

    return steps


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


@pytest.mark.parametrize("name", ["setup.py", "preflight.py"])
def test_an_old_python_can_parse_it(name: str) -> None:
    ast.parse((ROOT / "scripts" / name).read_text(), feature_version=(3, 6))


@pytest.mark.parametrize(
    ("lack", "wanted", "remedy"),
    [
        ({"version": "3.13.0"}, "Python 3.11 or 3.12", "PYTHON="),
        ({"version": "3.6.15"}, "Python 3.11 or 3.12", "PYTHON="),
        ({"lacks": ["ensurepip"]}, "venv and ensurepip", "python3.11-venv"),
        ({"shared": False}, "shared libpython", "libpython3.11"),
        ({"headers": "/nowhere/Python.h"}, "headers", "libpython3.11-dev"),
    ],
)
def test_each_lack_of_an_interpreter_is_named(lack: dict[str, object], wanted: str, remedy: str) -> None:
    (fault,) = preflight.interpreter_faults("/usr/bin/python3", {**WHOLE, **lack})
    assert fault.place == "/usr/bin/python3"
    assert wanted in fault.wanted
    assert remedy in fault.remedy


def test_all_lacks_of_an_interpreter_come_at_once() -> None:
    lacks = {"lacks": ["venv", "ensurepip"], "shared": False, "headers": "/nowhere/Python.h"}
    assert len(preflight.interpreter_faults("p", {**WHOLE, **lacks})) == 3
    assert preflight.interpreter_faults("p", dict(WHOLE)) == []


def test_all_lacks_of_the_machine_come_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(preflight.os, "uname", lambda: SimpleNamespace(sysname="Linux", machine="aarch64"))
    monkeypatch.setattr(preflight.os, "confstr", lambda name: "glibc 2.31")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=2.94e9))
    faults = preflight.machine_faults(tmp_path)
    assert [fault.got for fault in faults] == [
        "Linux aarch64",
        "glibc 2.31",
        "no no-such-compiler on PATH",
        "2.9 GB free",
    ]
    text = preflight.report(faults)
    assert "lacks 4 things" in text
    assert all(f"{fault.place}: got {fault.got}, wanted {fault.wanted}: {fault.remedy}" in text for fault in faults)


@pytest.mark.parametrize("libc", ["glibc 2.35", "glibc 2.36", "glibc 3.1"])
def test_a_new_enough_c_library_is_no_fault(libc: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(preflight.os, "confstr", lambda name: libc)
    assert "C library" not in [fault.place for fault in preflight.machine_faults(tmp_path)]


def test_a_shim_that_fails_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script(tmp_path / "shims/python3.11", "echo 'command not found' >&2; exit 127")
    fake_python(tmp_path / "a/python3.12", {**WHOLE, "version": "3.12.1", "shared": False})
    fake_python(tmp_path / "b/python3.12", {**WHOLE, "version": "3.12.4"})
    monkeypatch.delenv("PYTHON", raising=False)
    monkeypatch.setattr(preflight.sys, "executable", str(tmp_path / "gone"))
    monkeypatch.setenv("PATH", os.pathsep.join(str(tmp_path / name) for name in ("shims", "a", "b")))
    chosen, faults = preflight.choose_interpreter()
    assert chosen is not None
    assert (chosen.version, faults) == ("3.12.4", [])


def test_without_a_whole_interpreter_the_nearest_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PYTHON", raising=False)
    monkeypatch.setattr(preflight.sys, "executable", fake_python(tmp_path / "old", {**WHOLE, "version": "3.9.2"}))
    fake_python(tmp_path / "python3.12", {**WHOLE, "version": "3.12.1", "shared": False, "lacks": ["ensurepip"]})
    monkeypatch.setenv("PATH", str(tmp_path))
    chosen, faults = preflight.choose_interpreter()
    assert chosen is None
    assert [fault.place for fault in faults] == [str(tmp_path / "python3.12")] * 2


def test_python_named_by_the_user_is_the_only_candidate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHON", str(tmp_path / "absent"))
    chosen, (fault,) = preflight.choose_interpreter()
    assert chosen is None
    assert (fault.place, fault.got) == (str(tmp_path / "absent"), "nothing that runs")


def test_the_probe_describes_this_interpreter() -> None:
    found = preflight.probe(sys.executable)
    assert found is not None
    assert found.version == ".".join(map(str, sys.version_info[:3]))


def test_a_lack_is_exit_code_2_and_writes_nothing(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = names(project)
    monkeypatch.setenv("PYTHON", str(project / "absent"))
    monkeypatch.setattr(
        setup, "machine_faults", lambda root: [preflight.Fault("disk", "1 GB free", "3 GB", "free some")]
    )
    assert setup.set_up(project, check_only=False) == 2
    assert names(project) == before
    errors = capsys.readouterr().err
    assert "lacks 2 things" in errors
    assert "nothing that runs" in errors
    assert "1 GB free" in errors


def test_check_only_reports(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = names(project)
    assert setup.set_up(project, check_only=True) == 0
    assert names(project) == before
    assert "nothing is missing; Python 3.11.7" in capsys.readouterr().out


def test_a_failed_step_shows_the_log_and_the_next_run_starts_afresh(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup, "steps", steps_of("touch .venv/half; echo no matching distribution; exit 3"))
    assert setup.set_up(project, check_only=False) == 1
    captured = capsys.readouterr()
    assert "no matching distribution" in captured.err
    assert "exit code 3" in captured.err
    assert re.search(r"step 1 +[\d.]+ s failed\n", captured.out)
    assert not setup.is_current(project)

    monkeypatch.setattr(setup, "steps", steps_of("true"))
    assert setup.set_up(project, check_only=False) == 0
    assert setup.is_current(project)
    assert not (project / ".venv/half").exists()


def test_a_whole_environment_is_left_alone(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "steps", steps_of("touch .venv/mine"))
    assert setup.set_up(project, check_only=False) == 0
    monkeypatch.setattr(setup, "steps", steps_of("exit 1"))
    assert setup.set_up(project, check_only=False) == 0
    assert (project / ".venv/mine").exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda venv: (venv / ".stamp").unlink(),
        lambda venv: (venv / "pyvenv.cfg").unlink(),
        lambda venv: (venv / "bin/python").unlink(),
        lambda venv: ((venv / "bin/python").unlink(), (venv / "bin/python").symlink_to("/gone")),
        lambda venv: (venv / ".stamp").write_text("half"),
        lambda venv: (venv.parent / "requirements/cpu.lock").write_text("other"),
        lambda venv: venv.parent.rename(venv.parent.with_name("moved")),
    ],
    ids=["no stamp", "no pyvenv.cfg", "no python", "base python gone", "stamp differs", "lock differs", "moved"],
)
def test_an_environment_that_is_not_whole_is_seen(project: Path, monkeypatch: pytest.MonkeyPatch, spoil) -> None:
    monkeypatch.setattr(setup, "steps", steps_of())
    assert setup.set_up(project, check_only=False) == 0
    assert setup.is_current(project)
    spoil(project / ".venv")
    assert not setup.is_current(project if project.exists() else project.with_name("moved"))


def test_another_python_named_by_the_user_is_seen(
    project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(setup, "steps", steps_of())
    assert setup.set_up(project, check_only=False) == 0
    monkeypatch.setenv("PYTHON", fake_python(tmp_path / "python3.12", {**WHOLE, "version": "3.12.1"}))
    assert not setup.is_current(project)
    monkeypatch.delenv("PYTHON")
    assert setup.is_current(project)


def test_the_digest_covers_dependencies_but_not_the_tools(project: Path) -> None:
    pyproject = project / "pyproject.toml"
    before = setup.digest(project, "3.11.7")
    pyproject.write_text(pyproject.read_text().replace("line-length = 120", "line-length = 100"))
    assert setup.digest(project, "3.11.7") == before
    pyproject.write_text(pyproject.read_text().replace('"typer>=0.15"', '"typer>=0.16"'))
    assert setup.digest(project, "3.11.7") != before
    assert setup.digest(project, "3.11.8") != setup.digest(project, "3.11.7")


def test_the_digest_covers_what_is_compiled(project: Path) -> None:
    before = setup.digest(project, "3.11.7")
    with (project / "recsys/parallel/kernels.c").open("a") as source:
        source.write("/* other loops */\n")
    other = setup.digest(project, "3.11.7")
    assert other != before
    pyproject = project / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace('"-O3", ', ""))
    assert setup.digest(project, "3.11.7") != other


def test_old_loops_go_before_new_ones_are_compiled(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = project / "recsys/parallel/_kernels.cpython-311.so"
    old.touch()
    monkeypatch.setattr(setup, "steps", steps_of())
    assert setup.set_up(project, check_only=False) == 0
    assert not old.exists()


def test_a_second_set_up_waits_and_finds_it_done(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup, "steps", steps_of("echo built >> builds"))
    second = threading.Thread(target=setup.set_up, args=(project, False))
    with setup.only_one(project):
        second.start()
        deadline = time.monotonic() + 30
        while "waiting for another set-up" not in capsys.readouterr().out:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        found, _ = preflight.choose_interpreter()
        assert found is not None
        setup.build(project, found)
    second.join()
    assert (project / "builds").read_text() == "built\n"


def test_a_command_that_outlives_the_set_up_keeps_the_lock(project: Path) -> None:
    with setup.only_one(project):
        setup.call(["sh", "-c", f"sleep 60 >/dev/null 2>&1 & echo $! >'{project}/pid'"], project / "log")
    with (project / ".setup.lock").open() as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.kill(int((project / "pid").read_text()), signal.SIGKILL)
        fcntl.flock(lock, fcntl.LOCK_EX)


def test_only_pip_settings_that_name_sources_reach_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_TARGET", "PIP_REQUIRE_HASHES", "PIP_NO_COMPILE", "PYTHONDONTWRITEBYTECODE", "PYTHONPATH"):
        monkeypatch.setenv(name, "1")
    for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL", "UNRELATED"):
        monkeypatch.setenv(name, "kept")
    env = setup.child_environment()
    assert {"PIP_TARGET", "PIP_REQUIRE_HASHES", "PIP_NO_COMPILE", "PYTHONDONTWRITEBYTECODE", "PYTHONPATH"}.isdisjoint(
        env
    )
    assert [env[name] for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL", "UNRELATED", "PIP_USER")] == ["kept"] * 3 + ["0"]


def test_progress_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with setup.progress("torch"):
        pass
    with contextlib.suppress(setup.StepFailed), setup.progress("lock"):
        raise setup.StepFailed
    assert re.fullmatch(r"  torch +[\d.]+ s\n  lock +[\d.]+ s failed\n", capsys.readouterr().out)


def test_torch_comes_first_and_the_lock_without_dependencies() -> None:
    commands = dict(setup.steps(ROOT, "/opt/python3.11"))
    assert list(commands)[:2] == ["virtual environment", "torch"]
    assert "--no-deps" not in commands["torch"]
    (lock,) = [command for command in commands.values() if str(ROOT / "requirements/cpu.lock") in command]
    assert {"--no-deps", "--require-hashes"} <= set(lock)
