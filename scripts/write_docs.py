"""Writes docs/models.md from the registry: every model with its paper, what it reads and its settings.

With --check it writes nothing and fails where the file is not what it would write; a test runs it so.
"""

import argparse
import sys
from pathlib import Path

from pydantic.fields import FieldInfo

from recsys.models import MODELS, default_of
from recsys.models.head import ModelConfig
from recsys.optim import OptimizerSettings

TARGET = Path(__file__).resolve().parent.parent / "docs" / "models.md"
HEAD = """# Models

Written by `python scripts/models_doc.py` from the code; accuracy stands in [accuracy.md](accuracy.md). A model is
chosen by `[model] kind` in the experiment file, its settings stand beside it.

Every model reads value-weighted ids: a plain id counts once, `type = "numeric", as = "field"` multiplies its row by
the number, a `bag` sums (or averages) its ids times their weights. FM, DeepFM and NFM pair the single ids, also within
a bag; the others pair or stack whole fields. Dense inputs enter the MLP, and the first-order part where there is one.

Regularisers and optimizers are not the model's: `[embedding]` has `l2`, `linear_l2` and `l2_scope` (rows that a step
touched, whole tables, or activations as in the published FM, FNN and PNN code), `[train]` has `layer_l2`. Layers are
dropped by *keep* probability, one name everywhere; never on the logit, unless `compat = "seed"` asks for it.
"""


def main() -> None:
    """Writes or checks the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail where docs/models.md is out of date")
    text = page()
    if not parser.parse_args().check:
        TARGET.write_text(text, encoding="utf-8")
    elif TARGET.read_text(encoding="utf-8") != text:
        sys.exit(f"{TARGET} is out of date: run python scripts/models_doc.py")


def page() -> str:
    """The whole text."""
    parts = [HEAD, *(section(kind, config) for kind, config in MODELS.items()), optimizers()]
    return "\n".join(parts)


def section(kind: str, config: type[ModelConfig]) -> str:
    """One model."""
    what = (config.__doc__ or "").strip()
    lines = [
        f"## `{kind}`",
        "",
        f"{what} [Paper]({config.paper}).",
        "",
        "| setting | default | meaning |",
        "|---|---|---|",
    ]
    lines += [row(name, field) for name, field in config.model_fields.items() if name != "kind"]
    return "\n".join(lines if len(lines) > 6 else lines[:3]) + "\n"


def optimizers() -> str:
    """The constants that `[train]`, `[embedding]` and `[embedding.linear]` share."""
    lines = [
        "## Optimizers",
        "",
        "`[train]` for the dense part, `[embedding]` for tables, `[embedding.linear]` where the",
    ]
    lines += ["first-order weights have one of their own (Wide & Deep: FTRL beside Adagrad).", ""]
    lines += ["| setting | default | meaning |", "|---|---|---|"]
    return "\n".join(lines + [row(name, field) for name, field in OptimizerSettings.model_fields.items()]) + "\n"


def row(name: str, field: FieldInfo) -> str:
    """One setting of a table; a pipe would end the cell."""
    return f"| `{name}` | `{default_of(field)}` | {(field.description or '').replace('|', chr(92) + '|')} |"


if __name__ == "__main__":
    main()
