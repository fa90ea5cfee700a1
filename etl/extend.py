"""Incremental days: a dataset folder whose tables continue those of an older one, row for row.

The training files of the new day add to the counts of the older ones, so an experiment names the new files alone. Each
manifest says which training files its transform has seen, its own and those of its parents.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

from etl.artifact import Json, digest, read_json, sha256
from etl.faults import Fault, Faults
from etl.formats import files, holds_rows
from etl.schema import Table, read_schema
from etl.spec import FeatureSpec, resolve

_KIND = "xxh3:"  # of the digests by which files are known again


@dataclass(frozen=True)
class Parent:
    """The folder that is extended. `new_rows` is false where its transform has seen the very same training rows."""

    folder: Path
    hash: str
    steps: Json
    seen: tuple[Json, ...]
    new_rows: bool
    refit_numbers: bool

    def step(self, name: str) -> Json:
        """The fitted step of a feature."""
        return dict(self.steps[name])


def read_parent(spec: FeatureSpec, folder: Path | None, *, refit_numbers: bool) -> Parent | None:
    """The folder that the experiment's new training files extend, where one is named.

    Raises:
        Fault: no complete folder stands there, or an older program made it, or it has seen some of the training files.
        Faults: each feature or task that is not the folder's own.
    """
    if folder is None:
        if refit_numbers:
            raise Fault(
                "--refit-numbers", got="no --extend", wanted="a folder to extend", remedy="name it, or drop this"
            )
        return None
    path, remedy = folder / "manifest.json", "name a folder that `etl run` made"
    made = read_json(path, remedy=remedy)
    counted = made.get("counted")
    if counted is None or not all(content.startswith(_KIND) for one in counted for content in _digests(one)):
        wanted = "a record of the features and of the training files"
        raise Fault(str(path), got="none: an older version made it", wanted=wanted, remedy="run the ETL again")
    _refuse_other(made["sections"], _sections(spec), place=str(path))
    state = read_json(folder / "transform" / "transform.json", remedy=remedy)
    return Parent(
        folder,
        hash=sha256(path),
        steps={step["name"]: step for step in [*state["features"], *state["dense"]]},
        seen=tuple(made["counted"]),
        new_rows=_are_new(training(spec), made["counted"], place=f"data.train, to extend {folder}"),
        refit_numbers=refit_numbers,
    )


def record(spec: FeatureSpec, parent: Parent | None, *, tables: Sequence[Table], own: Json) -> Json:
    """What the manifest says for later days: the features, the training files seen (`own`: of this job), and the rows
    added to the parent.

    `extended.tables` holds for each table with a vocabulary the first added row and the rows in all: `from` to `to`.
    """
    if parent is None:
        return {"sections": _sections(spec), "counted": [own]}
    old = read_schema(parent.folder)
    grows = {table for table, users in spec.shared_tables().items() if not users[0].hash_rows}
    added = {table.name: {"from": old.rows(table.name), "to": table.rows} for table in tables if table.name in grows}
    extended = {"parent": parent.hash, "refit_numbers": parent.refit_numbers, "tables": added}
    seen = [*parent.seen, *([own] if parent.new_rows else [])]
    return {"sections": _sections(spec), "counted": seen, "extended": extended}


def extends(made: Json, parent: Parent | None, *, folder: Path) -> bool:
    """Whether the folder of a manifest continues this parent in this way, or no parent where there is none.

    A folder that was extended in its place and has seen the training rows is its own parent.
    """
    said = {key: value for key, value in made.get("extended", {}).items() if key != "tables"}
    if parent is None:
        return not said
    if parent.folder.resolve() == folder.resolve():
        return not parent.new_rows and said.get("refit_numbers", False) == parent.refit_numbers
    return said == {"parent": parent.hash, "refit_numbers": parent.refit_numbers}


def added_rows(manifest: Json) -> list[str]:
    """A line for each table with a vocabulary that continues a parent's."""
    tables = manifest.get("extended", {"tables": {}})["tables"]
    return [f"{name}: {t['to'] - t['from']:,} rows added, {t['to']:,} in all" for name, t in tables.items()]


def _sections(spec: FeatureSpec) -> Json:
    """What has to stay as it is, by section and name; a task's weight and a vector's size are no matter of the ETL."""
    features = {str(f.name): f.model_dump(mode="json", by_alias=True, exclude={"dim"}) for f in resolve(spec.features)}
    tasks = {task.name: task.model_dump(mode="json", exclude={"weight"}) for task in spec.tasks}
    return {"features": features, "tasks": tasks}


def _refuse_other(made: Json, wanted: Json, *, place: str) -> None:
    """Raises Faults, one for each setting of a feature or task that is not as it was."""
    remedy = "take the experiment that made the folder, with other data files, or run the ETL without --extend"
    found: list[Fault] = []
    for section in ("features", "tasks"):
        old, new = made[section], wanted[section]
        if old.keys() == new.keys() and list(old) != list(new):
            found.append(Fault(section, got=", ".join(new), wanted=f"the order {', '.join(old)}", remedy=remedy))
        for name in dict.fromkeys([*old, *new]):
            before, now = old.get(name, {}), new.get(name, {})
            found += [
                Fault(
                    f"{section}.{name}.{key}",
                    got=_said(now, key),
                    wanted=f"{_said(before, key)} of {place}",
                    remedy=remedy,
                )
                for key in dict.fromkeys([*before, *now])
                if before.get(key) != now.get(key)
            ]
    if found:
        raise Faults(found)


def _said(settings: Json, key: str) -> str:
    return repr(settings[key]) if key in settings else "nothing"


def training(spec: FeatureSpec) -> Json:
    """The training files that hold rows, each with the digest of its bytes, and one of what else decides the rows."""
    paths = [path for path in files(spec.data.train, what="train") if holds_rows(spec.data, path)]
    with ThreadPoolExecutor() as pool:
        places = [path.resolve() for path in paths]
        digests = list(pool.map(_content, places, [path.stat().st_mtime_ns for path in places]))
    rules: dict[str, Any] = spec.data.model_dump(mode="json", exclude={"train"})
    return {
        "files": [list(pair) for pair in zip(map(str, paths), digests, strict=True)],
        "rules": digest(rules | {split: bool(rules[split]) for split in ("valid", "test")}),
    }


@cache
def _content(path: Path, _changed: int) -> str:
    """The digest of a file that was changed at this time: large files are read once a job.

    It need not withstand forgers, so it is not a SHA-256, which takes as long as a twentieth of a job.
    """
    with path.open("rb") as file:
        return _KIND + hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _are_new(own: Json, seen: Sequence[Json], *, place: str) -> bool:
    """Whether no training file has been seen; false where the very same rows have been.

    A file is known by its bytes, whatever its name and time of change. Some files of several, or the same ones with
    another split, are neither: rows would count twice.
    """
    ids = [_digests(one) for one in seen]
    if (_digests(own), own["rules"]) in [(files, one["rules"]) for files, one in zip(ids, seen, strict=True)]:
        return False
    known = {file for files in ids for file in files}
    again = [path for path, content in own["files"] if content in known]
    if not again:
        return True
    got = f"{', '.join(again)}, whose rows it has counted, but not in this company or with this [data] section"
    wanted = "training files that it has not seen, or exactly those of one earlier run"
    raise Fault(
        place, got=got, wanted=wanted, remedy="name the new day's files alone, for example with --set data.train"
    )


def _digests(training: Json) -> list[str]:
    return [content for _, content in training["files"]]
