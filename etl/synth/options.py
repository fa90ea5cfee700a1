"""What `etl synth` is asked for; light, since the command line is made from it."""

from dataclasses import dataclass, field
from typing import Any

from etl.faults import Fault

FORMATS = {"criteo": ("tsv.gz", "tsv", "parquet"), "events": ("parquet", "tsv.gz", "tsv")}


def _option(default: object, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Options:
    """Rows and how they are written; the fields are the command's options."""

    rows: int = field(metadata={"help": "Rows in all, shared equally among the days."})
    seed: int = field(metadata={"help": "Equal options and seed make equal bytes."})
    days: int = _option(7, "Files day_0, day_1, ...")
    users: int | None = _option(None, "Default: one for 50 rows. Layout criteo: values of the column C3.")
    items: int | None = _option(None, "Default: one for 500 rows. Layout criteo: values of the column C4.")
    layout: str = _option("criteo", "criteo: display ads, one label. events: users, items, histories, two labels.")
    format: str | None = _option(None, "tsv.gz, tsv or parquet. Default: tsv.gz for criteo, parquet for events.")

    @property
    def chosen_format(self) -> str:
        """The layout's own one, unless another is named."""
        return self.format or FORMATS[self.layout][0]

    def faults(self) -> list[Fault]:
        """What is out of range."""
        found = []
        for name, text, known in (("layout", self.layout, FORMATS), ("format", self.format, FORMATS["criteo"])):
            if text is not None and text not in known:
                remedy = "choose one of these"
                found.append(Fault(f"--{name}", got=f"'{text}'", wanted=f"one of {', '.join(known)}", remedy=remedy))
        limits = {"rows": max(1, self.days), "days": 1, "seed": 0, "users": 1, "items": 2}
        for name, least in limits.items():
            value = getattr(self, name)
            if value is not None and value < least:
                why = " (a row a day)" if name == "rows" and least > 1 else ""
                wanted = f"at least {least}{why}"
                found.append(Fault(f"--{name}", got=str(value), wanted=wanted, remedy="give a larger number"))
        return found
