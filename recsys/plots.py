"""The report's figures: numbers in, one inline SVG out, in colours that the page chooses for light and dark."""

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Matplotlib draws in these stand-ins; `_on_page` turns each into `var(--p-XX)`, which the page's style defines.
INK, MUTED, GRID, POSITIVE, NEGATIVE = (f"#0102{code}" for code in ("a0", "a1", "a2", "b0", "b1"))
COLORS = tuple(f"#0102{code:02x}" for code in range(8))
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))
POINTS = 300  # of a curve; more cannot be told apart at this size
SIZE = (420, 290)
SQUARE = (420, 370)
STYLE: dict[Any, Any] = {  # matplotlib 3.11 types the keys as literals, older ones as texts
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Look:
    """How one run or task is told from the others, in every figure and in the key."""

    color: int = 0
    dash: int = 0

    @property
    def line(self) -> tuple[str, tuple[float, ...]]:
        """Stand-in colour and dash pattern."""
        return COLORS[self.color % len(COLORS)], DASHES[self.dash % len(DASHES)]


@dataclass(frozen=True)
class Curve:
    """A value over training steps; `best` is the step that the run kept."""

    steps: Floats
    values: Floats
    best: int | None
    look: Look


@dataclass(frozen=True)
class Scores:
    """Predicted probabilities and 0/1 labels of the rows of one task, all finite."""

    scores: Floats
    labels: Floats
    look: Look

    @property
    def undefined(self) -> str | None:
        """Why these rows say nothing about ranking, if so."""
        positives, rows = int(self.labels.sum()), len(self.labels)
        if not rows:
            return "no labelled row"
        return None if 0 < positives < rows else f"every label is {self.labels[0]:g}"


@dataclass(frozen=True)
class Bins:
    """Equal-frequency bins of the scores: mean score, observed rate and its 95 % Wilson interval."""

    predicted: Floats
    observed: Floats
    low: Floats
    high: Floats


def swatch(look: Look) -> str:
    """A short line in a look, for keys."""
    color, dashes = look.line
    style = (
        f"stroke:{_on_page(color)};stroke-width:3;stroke-dasharray:{' '.join(f'{2 * d:g}' for d in dashes) or 'none'}"
    )
    return f'<svg class="look" viewBox="0 0 28 10" aria-hidden="true"><path d="M0 5h28" style="{style}"/></svg>'


def roc_points(scores: Floats, labels: Floats) -> tuple[Floats, Floats]:
    """False and true positive rates at every distinct score, from (0, 0) to (1, 1). Needs both classes."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    true = np.cumsum(labels[order])[ends]
    false = ends + 1 - true
    return np.append(0.0, false / false[-1]), np.append(0.0, true / true[-1])


def calibration_bins(scores: Floats, labels: Floats) -> Bins:
    """Ten bins of equally many rows, fewer for few rows; rows of one score stay in one bin. Needs a row."""
    order = np.argsort(scores, kind="stable")
    scores, labels = scores[order], labels[order]
    count = max(1, min(10, len(scores) // 20))
    inner = scores[np.arange(1, count) * len(scores) // count]
    starts = np.unique(np.append(0, np.searchsorted(scores, inner, side="left")))
    rows = np.diff(np.append(starts, len(scores)))
    observed = np.add.reduceat(labels, starts) / rows
    z2 = 1.96**2
    center = (observed + z2 / (2 * rows)) / (1 + z2 / rows)
    half = np.sqrt(z2 * (observed * (1 - observed) / rows + z2 / (4 * rows**2))) / (1 + z2 / rows)
    # Of a rate of 0 or 1 the exact end is the rate itself, which rounding would miss.
    low, high = np.minimum(center - half, observed), np.maximum(center + half, observed)
    return Bins(np.add.reduceat(scores, starts) / rows, observed, low, high)


def loss_plot(curves: Sequence[Curve], *, alt: str) -> str:
    """Training loss over steps."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(SIZE, x="step", y="training loss")
        for curve in curves:
            steps, values = _averaged(curve.steps, curve.values)
            _line(axes, steps, y=values, look=curve.look)
        if len(curves) == 1 and curves[0].best is not None:
            axes.axvline(curves[0].best, color=MUTED, linewidth=1, dashes=(2, 2))
        _leave_out_the_start(axes, curves)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        return _svg(figure, name="loss", alt=alt)


def auc_plot(curves: Sequence[Curve], *, alt: str) -> str:
    """Validation AUC over steps, a ring at the step that each run kept."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(SIZE, x="step", y="validation AUC")
        for curve in curves:
            color, _ = curve.look.line
            many = len(curve.steps) > 40
            _line(axes, curve.steps, y=curve.values, look=curve.look)
            if not many:
                axes.plot(curve.steps, curve.values, ".", color=color, markersize=5)
            for i in np.flatnonzero(curve.steps == (-1 if curve.best is None else curve.best)):
                axes.plot(curve.steps[i], curve.values[i], "o", color=color, mfc="none", markersize=10, mew=1.8)
        if len(curves) == 1 and curves[0].best is not None:
            axes.axvline(curves[0].best, color=MUTED, linewidth=1, dashes=(2, 2))
        axes.margins(y=0.12)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        return _svg(figure, name="auc", alt=alt)


def roc_plot(scored: Sequence[Scores], *, alt: str) -> str:
    """ROC curves; those with one class only are left out."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(SQUARE, x="negatives ranked above the threshold", y="positives ranked above it")
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, dashes=(2, 2))
        for one in scored:
            if one.undefined is None:
                false, true = roc_points(one.scores, one.labels)
                # Evenly along the curve, so that a steep rise keeps its shape.
                kept = np.unique(np.searchsorted(false + true, np.linspace(0, 2, POINTS)).clip(0, len(true) - 1))
                _line(axes, false[kept], y=true[kept], look=one.look).set_clip_on(False)
        _unit_square(axes, limit=1.0)
        return _svg(figure, name="roc", alt=alt)


def calibration_plot(scored: Sequence[Scores], *, alt: str) -> str:
    """Observed rate against mean score in each bin, with 95 % intervals."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(SQUARE, x="mean predicted probability", y="observed rate of positives")
        limit = 0.0
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, dashes=(2, 2))
        for one in (one for one in scored if len(one.scores)):
            bins = calibration_bins(one.scores, one.labels)
            color, dashes = one.look.line
            axes.vlines(bins.predicted, bins.low, bins.high, color=color, linewidth=4, alpha=0.35)
            line = _line(axes, bins.predicted, y=bins.observed, look=one.look)
            line.set(marker="o", markersize=5, linewidth=1.1, dashes=dashes)
            limit = max(limit, bins.predicted.max(), bins.high.max())
        _unit_square(axes, limit=min(1.0, limit * 1.08) or 1.0)
        return _svg(figure, name="calibration", alt=alt)


def histogram_plot(one: Scores, *, name: str, alt: str) -> str:
    """Shares of the positive and of the negative rows in each interval of the score."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(SIZE, x="predicted probability", y="share of the label's rows")
        top = float(np.quantile(one.scores, 0.999)) if len(one.scores) else 1.0
        edges = np.linspace(0, min(1.0, top * 1.02) or 1.0, 41)
        for label, color in ((0, NEGATIVE), (1, POSITIVE)):
            chosen = one.scores[one.labels == label].clip(max=edges[-1])
            if len(chosen):
                shares = np.histogram(chosen, edges)[0] / len(chosen)
                axes.stairs(shares, edges, fill=True, color=color, alpha=0.3)
                axes.stairs(shares, edges, color=color, linewidth=1.5)
        axes.set_xlim(0, edges[-1])
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        return _svg(figure, name=name, alt=alt)


def _axes(size: tuple[int, int], *, x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.tick_params(length=0, pad=6)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    return figure, axes


def _line(axes: Any, x: Floats, *, y: Floats, look: Look) -> Any:
    color, dashes = look.line
    (line,) = axes.plot(x, y, color=color, dashes=dashes)
    return line


def _unit_square(axes: Any, *, limit: float) -> None:
    axes.set(xlim=(0, limit), ylim=(0, limit), aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1))


def _leave_out_the_start(axes: Any, curves: Sequence[Curve]) -> None:
    """Lets the first tenth run off the top: it is so steep that it would flatten all that follows."""
    later = np.concatenate([curve.values[curve.steps >= 0.1 * curve.steps[-1]] for curve in curves])
    low, high = float(later.min()), float(later.max())
    room = 0.12 * (high - low)
    if room > 0:
        axes.set_ylim(low - room, high + room)


def _averaged(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """At most POINTS points, each the mean of its neighbours."""
    if len(x) <= POINTS:
        return x, y
    starts = np.arange(POINTS) * len(x) // POINTS
    rows = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / rows, np.add.reduceat(y, starts) / rows


def _on_page(text: str) -> str:
    return re.sub(r"#0102([0-9a-f]{2})", r"var(--p-\1)", text)


def _svg(figure: Figure, *, name: str, alt: str) -> str:
    """The figure as an element to put into HTML: no date, no namespace of its own, ids that no other figure has."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    text = text[text.index("<svg") :].strip()
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    text = _on_page(text)
    text = re.sub(r"<!--.*?-->\s*|<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]+"', text)
    head = f'<svg {box[0] if box else ""} role="img" aria-label="{html.escape(alt)}">'
    return re.sub(r"<svg[^>]*>", lambda _: head, text, count=1)
