"""One run, or several side by side, as one HTML file that needs nothing else."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from string import Template

from etl.artifact import write_text
from recsys import plots
from recsys.plots import Curve, Look, Scores, swatch
from recsys.report_run import Metrics, Run, TableSize, read_runs

# Metric -> its name on the page, how to read it, and the value that a perfect model reaches.
METRICS = {
    "auc": ("AUC", "higher is better", 1.0),
    "logloss": ("log loss", "lower is better", 0.0),
    "ne": ("NE", "lower is better; 1 = always predicting the base rate", 0.0),
    "calibration": ("calibration", "mean prediction / observed rate; 1 is exact", 1.0),
    "accuracy": ("accuracy", "higher is better", 1.0),
    "pr_auc": ("PR-AUC", "area under precision and recall; higher is better", 1.0),
    "ece": ("ECE", "mean distance of prediction and observed rate over 20 bins; lower is better", 0.0),
    "gauc": ("GAUC", "AUC within groups, weighed by their rows; higher is better", 1.0),
    "tf200_auc": ("AUC, 200 thresholds", "TensorFlow's approximation, for comparison with its figures", 1.0),
}
TABLES = 40  # rows of the table of tables; the smaller ones share one more row


def write_report(runs: list[Path]) -> Path:
    """Writes `report.html` into the first run's folder and returns its path.

    Raises:
        Fault, Faults: files of the runs are missing (all of them are named) or broken.
    """
    read = read_runs(runs)
    title = read[0].label if len(read) == 1 else f"{len(read)} runs compared"
    sections = [_head(read[0], title=title) if len(read) == 1 else _title(title), _metrics(read)]
    sections += [_training(read), _predictions(read), _tables(read), _settings(read)]
    page = Template(Path(__file__).with_name("report_page.html").read_text(encoding="utf-8"))
    target = runs[0] / "report.html"
    write_text(target, page.substitute(title=escape(f"{title}: training report"), body="\n".join(sections)))
    return target


def _title(title: str) -> str:
    return f'<p class="kicker">Rankforge training report</p><h1>{escape(title)}</h1>'


def _head(run: Run, *, title: str) -> str:
    count = len(run.schema.features) + len(run.schema.dense)
    kind, tasks = escape(run.experiment.model.kind), escape(", ".join(run.schema.task_names))
    names = ("training rows", "steps", "seconds", "rows / s", "best step")
    items = "".join(f"<div><dt>{n}</dt><dd>{v}</dd></div>" for n, v in zip(names, _speed(run), strict=True))
    what = f'<p class="soft">Model <b>{kind}</b>, {count} features, predicts {tasks}</p>'
    return f'{_title(title)}{what}<dl class="facts">{items}</dl>'


def _speed(run: Run) -> list[str]:
    """Rows, steps, seconds, rows per second and best step, as text."""
    result = run.result
    best = f"{result.best_step:,}" if result.best_step else "–"
    return [f"{result.rows:,}", f"{result.steps:,}", f"{result.seconds:,.1f}", f"{result.rows_per_second:,.0f}", best]


def _metrics(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return _section("Metrics", f'<div class="card">{_metrics_of(runs[0])}</div>')
    folded = [_details(f"{escape(run.label)}: valid and test", _metrics_of(run)) for run in runs]
    return _section("Comparison", f'<div class="card">{_comparison(runs)}</div>', *folded)


def _comparison(runs: Sequence[Run]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in _valued(run.result.test)))
    best = {name: _best((run.result.test.get(name) for run in runs), metric=name) for name in names}
    rows = []
    for i, run in enumerate(runs):
        head = f"{swatch(Look(i))}{escape(run.label)}<small>{escape(run.experiment.model.kind)}</small>"
        cells = []
        for name in names:
            value = run.result.test.get(name)
            mark = ' class="best"' if value is not None and value == best[name] else ""
            cells.append(f"<td{mark}>{_value(run, name, split='test')}</td>")
        cells += [f"<td>{text}</td>" for text in _speed(run)]
        rows.append(f'<tr><th scope="row">{head}</th>{"".join(cells)}</tr>')
    heads = ["run", *(_metric_name(name) for name in names), "rows", "steps", "seconds", "rows / s", "best step"]
    return _table(heads, rows, caption="Metrics on the test rows, the best of each in bold.")


def _metrics_of(run: Run) -> str:
    rows = []
    for name in dict.fromkeys([*_valued(run.result.valid), *_valued(run.result.test)]):
        _, how, _ = METRICS.get(name.rpartition("/")[2], ("", "", 0.0))
        cells = "".join(f"<td>{_value(run, name, split=split)}</td>" for split in ("valid", "test"))
        rows.append(f'<tr><th scope="row">{_metric_name(name)}<small>{how}</small></th>{cells}</tr>')
    caption = "Look for a gap between the two columns: the best step was chosen on the validation rows."
    return _table(["metric", "valid", "test"], rows, caption=caption)


def _valued(metrics: Metrics) -> Iterator[str]:
    return (name for name, value in metrics.items() if not isinstance(value, str))


def _metric_name(name: str) -> str:
    task, _, metric = name.rpartition("/")
    shown, _, _ = METRICS.get(metric, (escape(metric), "", 0.0))
    return f"{escape(task)}/{shown}" if task else shown


def _best(values: Iterable[float | str | None], *, metric: str) -> float | None:
    """The value nearest to the perfect one, where the metric is known and the runs differ."""
    known = [value for value in values if isinstance(value, float)]
    _, _, ideal = METRICS.get(metric.rpartition("/")[2], ("", "", None))
    return None if ideal is None or len(set(known)) < 2 else min(known, key=lambda value: abs(value - ideal))


def _value(run: Run, name: str, *, split: str) -> str:
    metrics = run.result.valid if split == "valid" else run.result.test
    value = metrics.get(name)
    if isinstance(value, float):
        return f"{value:.4f}"
    if name not in metrics:
        return "–"
    task, _, metric = name.rpartition("/")
    scored = run.scores.get(task or run.schema.task_names[0])
    known = scored.undefined if scored and split == "test" and metric == "auc" else None
    reason = metrics.get(f"{name}_reason") or known
    return f"undefined<small>{escape(str(reason))}</small>" if reason else "undefined"


def _training(runs: Sequence[Run]) -> str:
    losses, aucs = [], []
    for i, run in enumerate(runs):
        best = run.result.best_step or None
        # Of several tasks the loss is the sum, so it has the colour of none.
        look = Look(i) if len(runs) > 1 or len(run.scores) == 1 else Look(7)
        if "loss" in run.series:
            losses.append(Curve(*run.series["loss"], best, look))
        aucs += [
            Curve(*logged, best, _look(runs, i, task=task))
            for task in run.schema.task_names
            if (logged := run.valid_auc(task)) is not None
        ]
    line = "The dotted line is the best step. " if len(runs) == 1 and runs[0].result.best_step else ""
    loss = f"{line}It should flatten; the steep start runs off the top. Still falling at the end: train longer."
    auc = f"The ring is the best step{_best_auc(runs)}. A fall after it is overfitting; no fall: train longer."
    figures = [
        _figure("Training loss", plots.loss_plot(losses, alt=f"Training loss over steps. {loss}"), caption=loss)
        if losses
        else _absent("Training loss", "metrics.jsonl holds no loss."),
        _figure("Validation AUC", plots.auc_plot(aucs, alt=f"Validation AUC over steps. {auc}"), caption=auc)
        if aucs
        else _absent("Validation AUC", "metrics.jsonl holds no validation AUC."),
    ]
    return _section("Training", _key(runs), _grid(figures))


def _best_auc(runs: Sequence[Run]) -> str:
    """The value at the ring, where there is one."""
    logged = runs[0].valid_auc(runs[0].schema.task_names[0])
    if len(runs) > 1 or len(runs[0].scores) > 1 or logged is None:
        return ""
    return "".join(
        f", {step:,.0f}, with {auc:.4f}" for step, auc in zip(*logged, strict=True) if step == runs[0].result.best_step
    )


def _predictions(runs: Sequence[Run]) -> str:
    scored = [
        (i, task, replace(scores, look=_look(runs, i, task=task)))
        for i, run in enumerate(runs)
        for task, scores in run.scores.items()
    ]
    undefined = [f"{_series_name(runs, i, task=t)}: undefined, {s.undefined}." for i, t, s in scored if s.undefined]
    roc = " ".join(["The nearer to the upper left corner, the better; the dotted diagonal is chance.", *undefined])
    bins = (
        "Ten bins of equally many rows, with 95 % intervals. Below the diagonal the model promises too much, "
        "above it too little."
    )
    drawn = [scores for _, _, scores in scored]
    figures = [
        _figure("ROC curve", plots.roc_plot(drawn, alt=f"ROC curve. {roc}"), caption=escape(roc)),
        _figure("Calibration", plots.calibration_plot(drawn, alt=f"Calibration plot. {bins}"), caption=bins),
    ]
    for i, task, scores in scored:
        name = _series_name(runs, i, task=task)
        figures.append(_histogram(scores, name=name, id_=f"scores{i}-{len(figures)}"))
    return _section("Predictions on the test rows", _key(runs), _grid(figures))


def _histogram(scores: Scores, *, name: str, id_: str) -> str:
    positives = int(scores.labels.sum())
    counts = (("positive", positives), ("negative", len(scores.labels) - positives))
    key = " and ".join(f'<span class="swatch {label}"></span>{label} ({count:,} rows)' for label, count in counts)
    how = "Each colour sums to 100 %; the less the two overlap, the better the model tells them apart."
    title = f"Scores by label: {name}" if name else "Scores by label"
    return _figure(title, plots.histogram_plot(scores, name=id_, alt=f"{title}. {how}"), caption=f"{key}. {how}")


def _tables(runs: Sequence[Run]) -> str:
    """Of several runs those with tables of their own; runs that share sizes are shown once."""
    groups: dict[tuple[TableSize, ...], list[str]] = {}
    for run in runs:
        groups.setdefault(tuple(run.table_sizes()), []).append(run.label)
    cards = []
    for sizes, labels in groups.items():
        title = f"<h3>{escape(', '.join(labels))}</h3>" if len(groups) > 1 else ""
        cards.append(f'<div class="card">{title}{_sizes(sizes)}</div>')
    return _section("Embedding tables", *cards)


def _sizes(sizes: Sequence[TableSize]) -> str:
    top = max((size.megabytes for size in sizes), default=1.0)
    rows = []
    for size in sizes[:TABLES]:
        bar = f'<td class="bar"><i style="width:{100 * size.megabytes / top:.1f}%"></i></td>'
        cells = f"<td>{size.rows:,}</td><td>{size.width}</td><td>{_megabytes([size])}</td>{_use(size)}"
        rows.append(f'<tr><th scope="row">{escape(size.name)}</th>{bar}{cells}</tr>')
    rest = sizes[TABLES:]
    sums = [(f"{len(rest)} smaller ones", rest)] if rest else []
    for name, some in [*sums, (f"all {len(sizes)} tables", sizes)]:
        total = f"<td>{sum(size.rows for size in some):,}</td><td></td><td>{_megabytes(some)}</td><td></td><td></td>"
        rows.append(f'<tr><th scope="row">{name}</th><td class="bar"></td>{total}</tr>')
    caption = (
        "Where the memory goes. Width: floats of a row, first-order weight included. Optimizer state is not counted. "
        "Dead: rows that no training row looks up. Top 1 %: the share of lookups that goes to the busiest rows."
    )
    return _table(["table", "", "rows", "width", "MB", "dead", "top 1 %"], rows, caption=caption)


def _use(size: TableSize) -> str:
    """Dead rows and the share of the busiest, where they were counted."""
    share = "–" if size.use is None or size.use.top_share is None else f"{size.use.top_share:.1%}"
    return f"<td>{f'{size.use.dead / size.use.rows:.1%}' if size.use else '–'}</td><td>{share}</td>"


def _megabytes(sizes: Iterable[TableSize]) -> str:
    total = sum(size.megabytes for size in sizes)
    return f"{total:,.1f}" if total >= 10 else f"{total:.3f}" if total >= 0.001 else "&lt; 0.001"


def _settings(runs: Sequence[Run]) -> str:
    several = len(runs) > 1
    folded = [
        _details(
            f"experiment.json of {escape(run.label)}" if several else "experiment.json",
            f"<pre>{escape(run.settings)}</pre>",
        )
        for run in runs
    ]
    return _section("Settings", *folded)


def _look(runs: Sequence[Run], i: int, *, task: str) -> Look:
    """Of several runs the colour is the run and the dash the task; of one run the colour is the task."""
    at = runs[i].schema.task_names.index(task)
    return Look(i, at) if len(runs) > 1 else Look(at)


def _series_name(runs: Sequence[Run], i: int, *, task: str) -> str:
    """What tells this line from the others; nothing where there is one."""
    names = [runs[i].label] if len(runs) > 1 else []
    return ", ".join([*names, task] if len(runs[i].scores) > 1 else names)


def _key(runs: Sequence[Run]) -> str:
    named = {
        _series_name(runs, i, task=task): _look(runs, i, task=task) for i, run in enumerate(runs) for task in run.scores
    }
    items = "".join(f"<li>{swatch(look)}{escape(name)}</li>" for name, look in named.items())
    return f'<ul class="key">{items}</ul>' if len(named) > 1 else ""


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{title}</h2>\n{''.join(parts)}</section>"


def _grid(figures: Sequence[str]) -> str:
    return f'<div class="grid">{"".join(figures)}</div>'


def _figure(title: str, svg: str, *, caption: str) -> str:
    """The caption is HTML, the title a text."""
    return f"<figure><h3>{escape(title)}</h3>{svg}<figcaption>{caption}</figcaption></figure>\n"


def _absent(title: str, why: str) -> str:
    return f'<div class="card"><h3>{escape(title)}</h3><p class="soft">{escape(why)}</p></div>\n'


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>{content}</details>\n"


def _table(heads: Sequence[str], rows: Sequence[str], *, caption: str) -> str:
    """Heads and rows are HTML, the caption is too, without tags."""
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = "\n".join(rows)
    table = f'<table aria-label="{caption}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<p class="note">{caption}</p><div class="scroll">{table}</div>'
