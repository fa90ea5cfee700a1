"""How much host memory there is for this process and those beside it."""

from collections.abc import Iterator
from pathlib import Path

import psutil

_OWN, _MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def host_memory_bytes(own: Path = _OWN, mount: Path = _MOUNT) -> int:
    """The machine's memory, or what a container or a job may take of it where that is less.

    `own` lists the control groups of this process, `mount` is where they lie.
    """
    total: int = psutil.virtual_memory().total
    return min([total, *_limits(own, mount)])


def _limits(own: Path, mount: Path) -> Iterator[int]:
    """Of the groups of this process and those around them; a group that the container does not see has none."""
    lines = own.read_text().splitlines() if own.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if not controllers:
            folder, name = mount, "memory.max"
        elif "memory" in controllers.split(","):
            folder, name = mount / "memory", "memory.limit_in_bytes"
        else:
            continue
        inner = Path(path.lstrip("/"))
        for group in (inner, *inner.parents):
            file = folder / group / name
            text = file.read_text().strip() if file.is_file() else "max"
            if text != "max":
                yield int(text)
