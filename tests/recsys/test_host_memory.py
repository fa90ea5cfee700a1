"""What a container may use is what there is, by either version of control groups."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from recsys.host_memory import host_memory_bytes
from recsys.parallel.sharders import hardware_here
from recsys.parallel.world import open_world

GB = 10**9


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=64 * GB))


@pytest.mark.parametrize(
    ("groups", "files", "wanted"),
    [
        ("0::/\n", {}, 64),
        ("0::/\n", {"memory.max": "max"}, 64),
        ("0::/\n", {"memory.max": f"{8 * GB}"}, 8),
        ("0::/jobs/one\n", {"jobs/one/memory.max": "max", "jobs/memory.max": f"{6 * GB}"}, 6),
        ("0::/hidden/from/here\n", {"memory.max": f"{8 * GB}"}, 8),
        ("4:cpu,memory:/job\n1:name=x:/job\n", {"memory/job/memory.limit_in_bytes": f"{3 * GB}"}, 3),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, 64),
    ],
)
def test_the_least_limit_holds(tmp_path: Path, groups: str, files: dict[str, str], wanted: int) -> None:
    (tmp_path / "own").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert host_memory_bytes(tmp_path / "own", tmp_path / "mount") == wanted * GB


def test_training_plans_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys.parallel.sharders.host_memory_bytes", lambda: 5 * GB)
    with open_world("cpu") as world:
        assert hardware_here(world).ddr_bytes == 5 * GB
