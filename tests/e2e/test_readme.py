"""The README's commands, executed as they stand, and the demo as `make demo` runs it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the checkout, so that out/ of the real one stays untouched."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("data", "experiments", "scripts", "etl", "recsys", "deploy"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def run(command: str, *, folder: Path) -> str:
    environment = os.environ | {"COLUMNS": "120"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def result(folder: Path, name: str) -> dict[str, float]:
    return json.loads((folder / "out" / name / "run" / "result.json").read_text())["test"]


@pytest.mark.slow
@pytest.mark.dist
def test_the_steps_one_by_one(checkout: Path) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if line.strip()]
    assert len(commands) >= 8
    for command in commands:
        run(command, folder=checkout)
    for name in ("demo", "deepfm"):
        assert result(checkout, name)["auc"] >= 0.922
        assert result(checkout, name)["accuracy"] >= 0.864
    assert (checkout / "out/demo/bundle/bundle.json").is_file()


@pytest.mark.slow
@pytest.mark.triton
def test_the_demo(checkout: Path) -> None:
    printed = run("scripts/demo.sh", folder=checkout)
    assert "16,281 of 16,281 rows equal" in printed
    assert (checkout / "out/demo/run/report.html").stat().st_size > 10_000


def test_make_demo_and_make_test_are_what_the_readme_says() -> None:
    assert "make demo\n    make test" in README
    for target, wanted in (("demo", "scripts/demo.sh"), ("test", "-m pytest")):
        assert wanted in run(f"make -n {target}", folder=ROOT)


def test_the_commands_that_need_a_server_exist() -> None:
    for line in re.findall(r"^    \.venv/bin/python -m (deploy \w+)", README, re.MULTILINE):
        assert "Usage" in run(f"{sys.executable} -m {line} --help", folder=ROOT)
