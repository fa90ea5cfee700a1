"""Writes what the documentation says of every model: its paper, what it reads, its settings and what it reaches.

The sources are the code and docs/accuracy.csv. docs/models.md is written whole; README.md and docs/accuracy.md have
tables between marks. With --check nothing is written, and it fails where a file is not what it would be; a test runs it
so.
"""

import argparse
import csv
import re
import sys
from pathlib import Path
from statistics import mean, stdev

from pydantic.fields import FieldInfo

from recsys.models import MODELS, default_of
from recsys.models.head import ModelConfig
from recsys.optim import OptimizerSettings

ROOT = Path(__file__).resolve().parent.parent
MODELS_PAGE, README, ACCURACY = ROOT / "docs" / "models.md", ROOT / "README.md", ROOT / "docs" / "accuracy.md"
DATASETS = {"frappe": "Frappe", "beauty": "Amazon Beauty", "hillstrom": "Hillstrom", "adult": "Census Income"}
FRAPPE = {
    "wide": ("LR", 0.9356, 0.3076),
    "fm": ("FM", 0.9671, 0.2065),
    "afm": ("AFM", 0.9697, 0.2264),
    "nfm": ("NFM", 0.9804, 0.2058),
    "deep": ("DNN", 0.9833, 0.1622),
    "pnn1": ("PNN, inner", 0.9841, 0.1540),
    "wide_deep": ("Wide & Deep", 0.9841, 0.1490),
    "deepfm": ("DeepFM", 0.9842, 0.1482),
    "dcn": ("DCN", 0.9839, 0.1527),
    "dcnv2": ("DCN-v2", 0.9845, 0.1491),
    "dlrm": ("DLRM", 0.9840, 0.1444),
    "autoint": ("AutoInt+", 0.9848, 0.1490),
    "final_mlp": ("FinalMLP", 0.9861, 0.1484),
    "masknet": ("MaskNet", 0.9837, 0.1696),
    "fnn": ("FNN", None, None),
    "pnn2": ("PNN, kernel", None, None),
    "deep_crossing": ("Deep Crossing", None, None),
}
"""Name, test AUC and log loss of openbenchmark/BARS, Frappe_x1, single runs."""
Line = dict[str, str]
HEAD = """# Models

Written by `python scripts/write_docs.py` from the code and from the figures that [accuracy.md](accuracy.md) explains. A
model is chosen by `[model] kind` in the experiment file, its settings stand beside it.

Every model reads value-weighted ids: a plain id counts once, `type = "numeric", as = "field"` multiplies its row by
the number, a `bag` sums (or averages) its ids times their weights. FM, DeepFM and NFM pair the single ids, also within
a bag; the others pair or stack whole fields. Dense inputs enter the MLP, and the first-order part where there is one.

Regularisers and optimizers are not the model's: `[embedding]` has `l2`, `linear_l2` and `l2_scope` (rows that a step
touched, whole tables, or activations as in the published FM, FNN and PNN code), `[train]` has `layer_l2`. Whole tables
take long to move where they are large: `l2_every_steps` lets only touched rows move at most steps. Layers are dropped
by *keep* probability, one name everywhere; never on the logit, unless `compat = "seed"` asks for it.
"""


def main() -> None:
    """Writes or checks the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail where a file is out of date")
    check = parser.parse_args().check
    for path, text in pages().items():
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path} is out of date: run python scripts/write_docs.py")


def pages() -> dict[Path, str]:
    """Each file and its whole text."""
    with (ROOT / "docs" / "accuracy.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    sections = (section(kind, config, lines=lines) for kind, config in MODELS.items())
    return {
        MODELS_PAGE: "\n".join([HEAD, *sections, optimizers()]),
        README: filled(README, mark="models", text=overview(lines)),
        ACCURACY: filled(ACCURACY, mark="frappe", text=frappe(lines)),
    }


def filled(path: Path, *, mark: str, text: str) -> str:
    """The file with `text` between the marks."""
    start, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->"
    whole = path.read_text(encoding="utf-8")
    return re.sub(f"(?<={re.escape(start)}).*?(?={re.escape(end)})", lambda _: text, whole, flags=re.DOTALL)


def experiments(lines: list[Line], kind: str) -> list[tuple[str, str]]:
    """Experiment files of a model and what they reach, the most telling dataset first."""
    own = {line["experiment"] for line in lines if line["kind"] == kind}
    datasets = list(DATASETS)
    ordered = sorted(own, key=lambda path: (datasets.index(dataset(path)), path))
    return [(path, reached([line for line in lines if line["experiment"] == path])) for path in ordered]


def dataset(experiment: str) -> str:
    """experiments/frappe/fm.toml -> frappe; the demo reads the same rows as the experiments of adult."""
    return "adult" if experiment == "experiments/demo.toml" else experiment.split("/")[1]


def reached(lines: list[Line]) -> str:
    """AUC .9749 ± .0002 (3 seeds), each task by its name where there are several."""
    tasks = sorted({line["task"] for line in lines})
    parts = []
    for task in tasks:
        values = [float(line["auc"]) for line in lines if line["task"] == task]
        name = f"{task} " if len(tasks) > 1 else ""
        parts.append(f"{name}{figure(values)}")
    return f"AUC {', '.join(parts)} ({len({line['seed'] for line in lines})} seeds)"


def figure(values: list[float]) -> str:
    """Mean and standard deviation."""
    spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{mean(values):.4f}{spread}".replace("0.", ".")


def overview(lines: list[Line]) -> str:
    """The README's table."""
    rows = ["| `kind` | what it is | test AUC, mean ± standard deviation |", "|---|---|---|"]
    for kind, config in MODELS.items():
        what = f"{(config.__doc__ or '').strip().rstrip('.')} ([paper]({config.paper}))".replace("|", chr(92) + "|")
        found = [f"{DATASETS[dataset(path)]}: {text}" for path, text in experiments(lines, kind)[:1]]
        rows.append(f"| [`{kind}`](docs/models.md#{kind}) | {what} | {''.join(found) or '–'} |")
    return "\n".join(rows) + "\n"


def frappe(lines: list[Line]) -> str:
    """Every model beside the published figures."""
    rows = [
        "| model | test AUC | seeds | log loss | published AUC | published log loss | minutes a run |",
        "|" + "---|" * 7,
    ]
    for kind, (name, *published) in FRAPPE.items():
        own = [line for line in lines if line["experiment"] == f"experiments/frappe/{kind}.toml"]
        auc, logloss, minutes = ([float(line[key]) for line in own] for key in ("auc", "logloss", "minutes"))
        if own:
            known = " | ".join("–" if value is None else f"{value:.4f}".lstrip("0") for value in published)
            seeds = ", ".join(f"{value:.4f}".lstrip("0") for value in auc)
            rows.append(
                f"| {name} (`{kind}`) | {figure(auc)} | {seeds} | {figure(logloss)} | {known} | {mean(minutes):.1f} |"
            )
    return "\n".join(rows) + "\n"


def section(kind: str, config: type[ModelConfig], *, lines: list[Line]) -> str:
    """One model."""
    what = (config.__doc__ or "").strip()
    text = [f"## `{kind}`", "", f"{what} [Paper]({config.paper}).", ""]
    found = experiments(lines, kind)
    text += [f"- [`{path}`](../{path}): {DATASETS[dataset(path)]}, test {reach}" for path, reach in found]
    text += [""] if found else []
    settings = [row(name, field) for name, field in config.model_fields.items() if name != "kind"]
    text += ["| setting | default | meaning |", "|---|---|---|", *settings] if settings else []
    return "\n".join(text).rstrip("\n") + "\n"


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
