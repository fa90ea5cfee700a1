"""What `etl inspect` finds, as one HTML file that needs nothing else."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from etl.artifact import Json, write_text
from etl.faults import Fault

MILD, STRONG = 0.1, 0.25  # as drift is usually read
WIDTH, HEIGHT, FOOT = 300, 110, 16  # of a small figure, its foot for the axis' two ends


def write_page(found: Json, path: Path) -> None:
    """Writes the page of `inspect`'s figures.

    Raises:
        Fault: the path lies in the dataset folder, whose files are listed with their hashes, or in no folder.
    """
    remedy = "name another file with --html"
    if path.resolve().is_relative_to(Path(found["folder"]).resolve()):
        got, wanted = "a file in the dataset folder", "one outside: the folder's files are those of its manifest"
        raise Fault(str(path), got=got, wanted=wanted, remedy=remedy)
    if not path.parent.is_dir() or path.is_dir():
        raise Fault(str(path), got="no place for a file", wanted="a file in a folder that exists", remedy=remedy)
    page = Template(Path(__file__).with_name("inspect_page.html").read_text(encoding="utf-8"))
    body = "\n".join([_head(found), _labels(found), _ids(found), _numbers(found)])
    write_text(path, page.substitute(title=escape(f"{found['folder']}: dataset"), body=body))


def _head(found: Json) -> str:
    rows = {f"{split} rows": part["rows"] for split, part in found["splits"].items()}
    tables = {feature["table"]: feature["rows"] for feature in found["features"]}
    facts = rows | {"features": len(found["features"]) + len(found["dense"]), "table rows": sum(tables.values())}
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{value:,}</dd></div>" for name, value in facts.items())
    title = f'<p class="kicker">Rankforge dataset</p><h1>{escape(found["folder"])}</h1>'
    return f'{title}<p class="soft">Made by the {escape(found["engine"])} engine</p><dl class="facts">{items}</dl>'


def _labels(found: Json) -> str:
    tasks = list(found["splits"]["train"]["label_rate"])
    rows = [
        f'<tr><th scope="row">{escape(task)}</th>'
        + "".join(f"<td>{part['label_rate'][task]:.4f}</td>" for part in found["splits"].values())
        + "</tr>"
        for task in tasks
    ]
    table = _table(["task", *found["splits"]], rows, caption="Share of rows with label 1.")
    slices = found["label_rate_by_position"]
    count = max(len(part) for part in slices.values())
    note = (
        f"By position: each split is cut into {count} parts with equally many rows, in the order of its raw files. "
        "These are not days. Where the files are in the order of time, old is left and new is right."
    )
    figures = [
        _figure(
            task,
            _curves({split: [part["label_rate"][task] for part in parts] for split, parts in slices.items()}),
            caption="Share of label 1 by position in each split.",
        )
        for task in tasks
    ]
    by_position = [f'<p class="note">{note}</p>', _key(), _grid(figures)]
    return _section("Labels", f'<div class="card">{table}</div>', _by_day(found, tasks), *by_position)


def _by_day(found: Json, tasks: Sequence[str]) -> str:
    """A figure a task, and a table; nothing where there is one day or file alone, or the folder is an older one."""
    counted = found["label_rate_by_day"]
    parts = [(split, part) for split, own in counted["splits"].items() for part in own] if counted else []
    names = list(dict.fromkeys(part["name"] for _, part in parts))
    if len(names) < 2:
        return ""
    names = sorted(names) if counted["by"] == "day" else names
    note = "By day, UTC where times have a zone." if counted["by"] == "day" else "By raw file, in the order of reading."
    figures = [
        _figure(task, _steps(parts, names=names, task=task), caption=f"Share of label 1 by {counted['by']}.")
        for task in tasks
    ]
    rows = [
        f'<tr><th scope="row">{escape(part["name"])}<small>{split}</small></th><td>{part["rows"]:,}</td>'
        + "".join(f"<td>{part['label_rate'][task]:.4f}</td>" for task in tasks)
        + "</tr>"
        for name in names
        for split, part in parts
        if part["name"] == name
    ]
    table = _table([counted["by"], "rows", *tasks], rows, caption="Rows, and share of rows with label 1.")
    details = f"<details><summary>Label rates by {counted['by']}</summary>{table}</details>"
    return f'<p class="note">{note}</p>{_key()}{_grid(figures)}{details}'


def _ids(found: Json) -> str:
    if not found["features"]:
        return ""
    caption = (
        "Missing and unseen values get row 0. Seen: distinct rows that occur, row 0 aside. Drift is the PSI between "
        "training and a split, over row 0, the ten most frequent training rows and the rest."
    )
    heads = ["feature", "table rows", "seen", "missing", "unseen", "drift"]
    rows = [
        f'<tr><th scope="row">{escape(f["name"])}<small>{escape(f["type"])}</small></th><td>{f["rows"]:,}</td>'
        f"<td>{_lines(f'{n:,}' for n in f['distinct'].values())}</td>"
        f"<td>{_bars(f['missing'])}</td><td>{_bars(f['unseen'])}</td><td>{_drifts(f['psi'])}</td></tr>"
        for f in found["features"]
    ]
    card = f'<div class="card">{_table(heads, rows, caption=caption)}</div>'
    return _section("Id features", _key(), card, *(_top(feature) for feature in found["features"]))


def _top(feature: Json) -> str:
    """The most frequent values, folded in, and how much of the training rows the most frequent ones cover."""
    splits = list(feature["values"])
    rows = []
    for top in feature["top"]:
        known = top["value"] is not None
        text = escape(top["value"]) if known else f"row {top['row']}"
        small = f"<small>row {top['row']}</small>" if known else "<small>text not kept</small>"
        cells = "".join(f"<td>{_bars({split: top['share'][split]})}</td>" for split in splits)
        rows.append(f'<tr><th scope="row">{text}{small}</th><td>{top["count"]:,}</td>{cells}</tr>')
    covered = [f"the {int(k):,} most frequent rows {share:.1%}" for k, share in feature["coverage"].items()]
    caption = f"Of the training values cover {', '.join(covered)}." if covered else "No training value has a row."
    table = _table(["value", "training count", *splits], rows, caption=caption)
    return f"<details><summary>{escape(feature['name'])}: most frequent values</summary>{table}</details>\n"


def _numbers(found: Json) -> str:
    if not found["dense"]:
        return ""
    note = (
        "Values as the model reads them, after filling and scaling: share of the split's rows in 30 bins between the "
        "0.5 % and the 99.5 % quantile of training, the rest in the outer bins. Drift is over training deciles."
    )
    figures = []
    for dense in found["dense"]:
        split_moments = dense["by_split"].items()
        moments = " · ".join(f"{split} {round(of['mean'], 6):.3g} ± {of['std']:.3g}" for split, of in split_moments)
        ends = f"training from {dense['min']:.4g} to {dense['max']:.4g}"
        missing = ", ".join(f"{split} {share:.1%}" for split, share in dense["missing"].items() if share is not None)
        missing = f" Missing: {missing}." if missing else ""
        caption = f"Drift {_drifts(dense['psi'], joined=', ')}. Mean ± deviation: {moments}; {ends}.{missing}"
        figures.append(_figure(dense["name"], _histogram(dense["histogram"]), caption=caption))
    return _section("Dense features", f'<p class="note">{note}</p>', _key(), _grid(figures))


def drift_word(value: float | None) -> str:
    """How a PSI is usually read."""
    if value is None:
        return "no values"
    return "strong shift" if value >= STRONG else "mild shift" if value >= MILD else "stable"


def _drifts(values: Mapping[str, float | None], *, joined: str = "") -> str:
    """One a split, in words and in colour above the thresholds."""
    parts = []
    for split, value in values.items():
        word = drift_word(value)
        shown = f"{split} {word}" if value is None else f"{split} {value:.3f} {word}"
        mark = {"mild shift": ' class="mild"', "strong shift": ' class="strong"'}.get(word, "")
        parts.append(f"<b{mark}>{shown}</b>" if mark else shown)
    return joined.join(parts) if joined else _lines(parts)


def _lines(parts: Iterable[str]) -> str:
    return "".join(f"<span>{part}</span>" for part in parts)


def _bars(shares: Mapping[str, float]) -> str:
    return "".join(
        f'<span class="{split}">{share:.1%}<i style="width:{100 * min(share, 1):.1f}%"></i></span>'
        for split, share in shares.items()
    )


def _curves(values: Mapping[str, Sequence[float]]) -> str:
    """A line a split over its positions, from 0 to a little above the highest value."""
    top = max((value for part in values.values() for value in part), default=0.0) * 1.15 or 1.0
    paths = []
    for split, part in values.items():
        xs = [WIDTH * (at + 0.5) / len(part) for at in range(len(part))]
        points = [f"{x:.1f},{HEIGHT * (1 - value / top):.1f}" for x, value in zip(xs, part, strict=True)]
        paths.append(f'<path class="line {split}" d="M{" L".join(points)}"/>')
    return _svg(paths, ends=("first rows", "last rows"), top=f"{top / 1.15:.4f}", alt="Share of label 1 by position")


def _steps(parts: Sequence[tuple[str, Json]], *, names: Sequence[str], task: str) -> str:
    """A level a day or file of each split, from 0 to a little above the highest value."""
    top = max(part["label_rate"][task] for _, part in parts) * 1.15 or 1.0
    width, levels = WIDTH / len(names), dict.fromkeys((split for split, _ in parts), "")
    at = {name: place for place, name in enumerate(names)}
    for split, part in parts:
        x, y = width * at[part["name"]], HEIGHT * (1 - part["label_rate"][task] / top)
        levels[split] += f"M{x:.1f},{y:.1f} h{width:.1f} "
    paths = [f'<path class="line {split}" d="{level.strip()}"/>' for split, level in levels.items()]
    ends = Path(names[0]).name, Path(names[-1]).name
    return _svg(paths, ends=ends, top=f"{top / 1.15:.4f}", alt="Share of label 1 by day or file")


def _histogram(histogram: Json) -> str:
    """Steps, a split over another."""
    top = max(max(part) for part in histogram["share"].values()) or 1.0
    paths = []
    for split, part in histogram["share"].items():
        width = WIDTH / len(part)
        steps = " ".join(f"V{HEIGHT * (1 - share / top):.1f} H{width * (at + 1):.1f}" for at, share in enumerate(part))
        paths.append(f'<path class="line {split}" d="M0,{HEIGHT} {steps} V{HEIGHT}"/>')
    ends = f"{histogram['edges'][0]:.3g}", f"{histogram['edges'][-1]:.3g}"
    return _svg(paths, ends=ends, top=f"{top:.1%}", alt="Histogram by split")


def _svg(paths: Sequence[str], *, ends: tuple[str, str], top: str, alt: str) -> str:
    low, high = (escape(end) for end in ends)
    foot = HEIGHT + FOOT
    return (
        f'<svg viewBox="0 -14 {WIDTH} {foot + 14}" role="img" aria-label="{escape(alt)}; highest {escape(top)}">'
        f'<path class="axis" d="M0,{HEIGHT} H{WIDTH}"/>{"".join(paths)}<text x="0" y="-4">{escape(top)}</text>'
        f'<text x="0" y="{foot - 2}">{low}</text>'
        f'<text x="{WIDTH}" y="{foot - 2}" text-anchor="end">{high}</text></svg>'
    )


def _key() -> str:
    items = "".join(f'<li class="{split}"><i></i>{split}</li>' for split in ("train", "valid", "test"))
    return f'<ul class="key">{items}</ul>'


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{title}</h2>\n{''.join(parts)}</section>"


def _grid(figures: Sequence[str]) -> str:
    return f'<div class="grid">{"".join(figures)}</div>'


def _figure(title: str, svg: str, *, caption: str) -> str:
    """The caption is HTML, the title a text."""
    return f"<figure><h3>{escape(title)}</h3>{svg}<figcaption>{caption}</figcaption></figure>\n"


def _table(heads: Sequence[str], rows: Sequence[str], *, caption: str) -> str:
    """Rows are HTML, heads and the caption are texts."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = "\n".join(rows)
    table = f'<table aria-label="{escape(caption)}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<p class="note">{escape(caption)}</p><div class="scroll">{table}</div>'
