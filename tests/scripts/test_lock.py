"""The lock that the set-up installs: complete, hashed, and without what must not come from it."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = ("dev", "k8s", "tensorboard")


def locked() -> dict[str, str]:
    """Name -> version of every pin in the lock."""
    text = (ROOT / "requirements/cpu.lock").read_text()
    return dict(re.findall(r"(?m)^([\w.-]+)==(\S+)", text))


def test_the_lock_holds_every_dependency_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for name in EXTRAS for text in project["optional-dependencies"][name]]
    wanted = [Requirement(text) for text in project["dependencies"] + extras]
    pins = locked()
    for requirement in wanted:
        if requirement.name != "torch":
            assert requirement.specifier.contains(pins[requirement.name]), requirement
    (torch,) = re.findall(r"(?m)^torch==(\S+)$", (ROOT / "requirements/torch.txt").read_text())
    assert next(r for r in wanted if r.name == "torch").specifier.contains(torch)


def test_the_lock_is_hashed_and_names_no_index() -> None:
    text = (ROOT / "requirements/cpu.lock").read_text()
    entries = re.split(r"(?m)^(?=[\w.-]+==)", text)[1:]
    assert len(entries) == len(locked()) > 50
    assert all("--hash=sha256:" in entry for entry in entries)
    assert not re.search(r"://|--index-url|--find-links|^/|@ file", text, re.MULTILINE)


def test_the_lock_leaves_out_what_comes_with_torch_or_fights_it() -> None:
    unwanted = [
        name for name in locked() if re.fullmatch(r"torch|triton|fbgemm-gpu|pynvml|nvidia-(cu|nccl|nv).*", name)
    ]
    assert unwanted == []
