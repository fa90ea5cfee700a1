"""Reads an experiment file: TOML, `--set a.b=c`, and every fault of it at once with its dotted path."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from etl.artifact import Json
from etl.faults import Fault, Faults
from etl.globs import expand_globs, has_globs
from etl.section import Name
from etl.spec import FeatureSpec

T = TypeVar("T", bound=BaseModel)
SECTIONS = ("name", "seed", "data", "features", "tasks", "etl", "model", "train", "embedding", "export", "serve")


class _Named(FeatureSpec):
    """What concerns the ETL, under a name that can be a folder's."""

    name: Name


def load(path: Path, *, overrides: Sequence[str], into: type[T]) -> T:
    """The experiment file as one frozen value.

    Raises:
        Fault: the file is missing or is not TOML, or an override is not `a.b=c`.
        Faults: unknown keys, wrong types and out-of-range values, all of them.
    """
    return parse(read(path, overrides=overrides), place=str(path), into=into)


def load_feature_spec(path: Path, *, overrides: Sequence[str]) -> tuple[str, FeatureSpec]:
    """The experiment's name and what concerns the ETL; other known sections are left to their owners."""
    raw = read(path, overrides=overrides)
    mine = {key: value for key, value in raw.items() if key in _Named.model_fields or key not in SECTIONS}
    named = parse(mine, place=str(path), into=_Named)
    return named.name, FeatureSpec(data=named.data, features=named.features, tasks=named.tasks, etl=named.etl)


def read(path: Path, *, overrides: Sequence[str]) -> Json:
    """The parsed TOML with the overrides applied and globs expanded; `name` defaults to the file's own."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Fault(str(path), got="no such file", wanted="an experiment file", remedy="check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise Fault(str(path), got=str(error), wanted="a TOML file", remedy="mend the syntax there") from None
    raw.setdefault("name", path.stem)
    for override in overrides:
        _override(raw, override)
    return expand_globs(raw, place=str(path)) if has_globs(raw) else raw


def parse(raw: Json, *, place: str, into: type[T]) -> T:
    """Validates; each of pydantic's complaints becomes a fault with the dotted path of its key."""
    try:
        return into.model_validate(raw)
    except ValidationError as error:
        raise Faults([_fault(detail, place=place) for detail in error.errors(include_url=False)]) from None


def _fault(detail: Any, *, place: str) -> Fault:
    where = ".".join(str(part) for part in detail["loc"]) or "the file"
    if detail["type"] == "extra_forbidden":
        return Fault(f"{place}: {where}", got="an unknown key", wanted="a known one", remedy="check its spelling")
    got = "nothing" if detail["type"] == "missing" else _short(detail.get("input"))
    wanted = detail["msg"].removeprefix("Value error, ")
    return Fault(f"{place}: {where}", got=got, wanted=wanted, remedy=f"correct '{where}' in the file or with --set")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _override(raw: Json, override: str) -> None:
    """Sets one dotted key; the value is read as TOML, or as a text where it is none."""
    key, equals, text = override.partition("=")
    place = f"--set {override}"
    if not equals or not all(key.split(".")):
        raise Fault(place, got=repr(override), wanted="a.b=value", remedy="name a key of the experiment file")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.split(".")
    node: Any = raw
    for part in parents:
        node = _child(node, part, place=place)
    _assign(node, last, value=value, place=place)


def _child(node: Any, part: str, *, place: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, place=place)]
    child = node.setdefault(part, {})
    if not isinstance(child, dict | list):
        raise Fault(place, got=f"'{part}' holds {_short(child)}", wanted="a section", remedy="check the path")
    return child


def _assign(node: Any, last: str, *, value: object, place: str) -> None:
    if isinstance(node, list):
        node[_index(node, last, place=place)] = value
    else:
        node[last] = value


def _index(node: list[Any], part: str, *, place: str) -> int:
    if part.isdecimal() and int(part) < len(node):
        return int(part)
    raise Fault(place, got=f"'{part}'", wanted=f"an index from 0 to {len(node) - 1}", remedy="count the blocks")
