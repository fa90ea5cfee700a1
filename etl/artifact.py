"""Files and folders that exist whole or not at all."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etl.faults import Fault

if TYPE_CHECKING:
    import pyarrow as pa

Json = dict[str, Any]
"""A JSON object as it stands in a file; what reads it parses it into a record of its own."""


def cache_dir() -> Path:
    """Where this user's machine keeps what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankforge"


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: object) -> str:
    """Hex digest of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def seed_of(*parts: int | str) -> int:
    """A generator's seed that depends on all parts."""
    return int(digest(list(parts))[:15], 16)


def write_json(path: Path, value: object) -> None:
    """Writes beside, syncs, renames. Raises ValueError on NaN: JSON has none."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes beside, syncs, renames."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def write_parquet(path: Path, table: "pa.Table") -> None:
    """Writes beside, renames."""
    import pyarrow.parquet as pq

    beside = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table, beside)
    beside.replace(path)


def read_json(path: Path, *, remedy: str) -> Any:
    """The JSON in a file of an artifact. Raises Fault where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Fault(str(path), got="no such file", wanted="an artifact's own file", remedy=remedy) from None
    except ValueError as error:
        raise Fault(str(path), got=f"broken JSON ({error})", wanted="the file as written", remedy=remedy) from None


def lost_files(folder: Path, files: Json) -> list[str]:
    """Those of the files of a manifest that are not there with as many bytes."""
    return [name for name, said in files.items() if _size(folder / name) != said["bytes"]]


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


@contextlib.contextmanager
def new_folder(target: Path, *, marker: str) -> Iterator[Path]:
    """A folder beside `target` that takes its place when the block ends well, and vanishes when it does not.

    What processes that were killed have left there is removed first. A link is followed: what it names is replaced.

    Raises:
        Fault: something stands at `target` that holds no file named `marker`, so it is none of ours to replace.
    """
    target = target.resolve()
    recover(target)
    if target.exists() and not (target / marker).is_file() and not _is_empty(target):
        got, remedy = f"something else than a folder with {marker}", "name another folder or move that one away"
        raise Fault(str(target), got=got, wanted="a free place, or an older folder of this kind", remedy=remedy)
    beside = _beside(target, "partial")
    beside.mkdir(parents=True)
    try:
        yield beside
        _swap(beside, target)
    finally:
        recover(target)


def recover(target: Path) -> None:
    """Removes what this process and ones that are no more have left beside a folder; what other hosts left stays.

    Where one ended after it had moved the old folder away and before the new one stood there, the old one comes back.
    """
    target = target.resolve()
    kinds = r"(?:partial(?:\..*)?|(?P<old>old))"
    name = re.compile(rf"\.{re.escape(target.name)}\.{re.escape(_host())}\.(?P<process>[0-9]+)\.{kinds}")
    for path in sorted(target.parent.iterdir()) if target.parent.is_dir() else ():
        found = name.fullmatch(path.name) if path.is_dir() else None
        if found and not _runs_elsewhere(int(found["process"])):
            if found["old"] and not target.exists():
                path.replace(target)
            shutil.rmtree(path, ignore_errors=True)


def _runs_elsewhere(process: int) -> bool:
    """Whether another process of this number runs."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return process != os.getpid()


def _is_empty(target: Path) -> bool:
    return target.is_dir() and not any(target.iterdir())


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{_host()}.{os.getpid()}.{kind}")


def _host() -> str:
    """Process numbers mean nothing on another host or in another container, which may see the same folder."""
    return os.uname().nodename


def _swap(beside: Path, target: Path) -> None:
    """The old folder is moved away only once the new one is on disk; `recover` removes it, or brings it back."""
    for path in sorted(beside.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if target.exists():
        target.replace(_beside(target, "old"))
    beside.replace(target)
