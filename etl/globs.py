"""Columns that an experiment file names by a glob, such as `C*`: those of the first training file."""

import fnmatch
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from etl.artifact import Json
from etl.data_spec import Data
from etl.faults import Fault

_MAGIC = re.compile(r"[*?\[]")


def has_globs(raw: Json) -> bool:
    """Whether a feature names columns by a glob."""
    return any(_MAGIC.search(text) for feature in _features(raw) for text in _texts(feature))


def expand_globs(raw: Json, *, place: str) -> Json:
    """The experiment with columns instead of globs, in the order of the file.

    Raises:
        Fault: a glob without a match, or a first training file that can't be read.
    """
    try:
        data = Data.model_validate(raw.get("data"))
    except ValidationError:
        return raw  # whose faults are told with all others
    from etl.formats import column_names, files  # with Arrow's functions: 6 MB that training does without

    path = files(data.train, what="train")[0]
    present = column_names(data, path)
    features = [dict(feature) for feature in _features(raw)]
    for at, feature in enumerate(features):
        if texts := _texts(feature):
            where = f"{place}: features.{at}.columns"
            feature["columns"] = [name for text in texts for name in _matches(text, present, path=path, where=where)]
    return raw | {"features": features}


def _matches(text: str, present: list[str], *, path: Path, where: str) -> list[str]:
    if not _MAGIC.search(text):
        return [text]
    if not (found := [name for name in present if fnmatch.fnmatchcase(name, text)]):
        got, wanted = f"'{text}', which no column of {path} matches", f"a glob for some of {', '.join(present)}"
        raise Fault(where, got=got, wanted=wanted, remedy="mend the glob, or name the columns")
    return found


def _features(raw: Json) -> list[Any]:
    """The feature blocks; none where the file's form is wrong, which is told later."""
    blocks = raw.get("features")
    return blocks if isinstance(blocks, list) and all(isinstance(block, dict) for block in blocks) else []


def _texts(feature: Json) -> list[str]:
    columns = feature.get("columns")
    return columns if isinstance(columns, list) and all(isinstance(text, str) for text in columns) else []
