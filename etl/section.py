"""What the sections of an experiment file are made of."""

import re
from collections.abc import Iterator, Sequence
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

_NAME = r"^[A-Za-z][A-Za-z0-9_]*$"
_LONGEST = 64
Name = Annotated[str, Field(pattern=_NAME, max_length=_LONGEST)]

_RANGE = re.compile(r"(?P<stem>[A-Za-z][A-Za-z0-9_]*?)(?P<first>[0-9]+)\.\.(?P=stem)(?P<last>[0-9]+)")
_MOST = 10_000


class Section(BaseModel):
    """A part of the experiment file: frozen, strict, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class IdSection(Section):
    """What every feature that reads an embedding row shares."""

    linear_only: bool = Field(False, description="a first-order weight alone, no embedding vector")
    dim: int | None = Field(
        None, ge=4, multiple_of=4, description="floats of a vector that are learnt, the others stay 0; all unless set"
    )

    @model_validator(mode="after")
    def _has_a_vector(self) -> "IdSection":
        if self.linear_only and self.dim:
            raise ValueError("'dim' is the size of a vector, which 'linear_only' leaves out: drop one of them")
        return self


def expanded(columns: Sequence[str]) -> list[str]:
    """The columns in order; `C1..C3` stands for C1, C2, C3, and `d01..d10` for d01 to d10.

    Raises:
        ValueError: a range that is malformed, descends or names more than 10,000 columns.
    """
    return [name for text in columns for name in _names(text)]


def _names(text: str) -> Iterator[str]:
    if ".." not in text:
        yield text
        return
    found = _RANGE.fullmatch(text)
    first, last = (found["first"], found["last"]) if found else ("", "")
    padded = any(len(end) > 1 and end.startswith("0") for end in (first, last))
    if found is None or (padded and len(first) != len(last)) or not 0 <= int(last) - int(first) < _MOST:
        wanted = f"a range of one stem and ascending numbers, such as C1..C26 or d01..d10, of at most {_MOST} columns"
        raise ValueError(f"'{text}' is not {wanted}")
    for number in range(int(first), int(last) + 1):
        yield f"{found['stem']}{number:0{len(first) if padded else 1}d}"


def _name_or_range(text: str) -> str:
    if bad := [name for name in _names(text) if not re.fullmatch(_NAME, name) or len(name) > _LONGEST]:
        raise ValueError(f"'{bad[0]}' is not a name of letters, digits and _ that begins with a letter")
    return text


ColumnNames = Annotated[str, AfterValidator(_name_or_range)]
"""One column, or a range of columns such as `C1..C26`."""
