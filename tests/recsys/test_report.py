"""The report: what it shows, that it needs nothing else, and that a browser draws it."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.image import imread

from etl.artifact import write_json
from etl.faults import Fault, Faults
from etl.schema import IdFeature, Schema, Table, TaskColumn
from recsys.plots import calibration_bins, roc_points
from recsys.report import write_report

HOSTILE = "<script>alert('x')</script> & \"co\""
CHROMIUM = shutil.which("chromium")
FIGURES = ["Training loss", "Validation AUC", "ROC curve", "Calibration", "Scores by label"]
VOID = {"meta"}


def make_run(folder: Path, *, name: str = "clicks", tasks: Sequence[str] = ("click",), rows: int = 4000) -> Path:
    """A finished run folder with synthetic, calibrated scores."""
    folder.mkdir(parents=True)
    schema = Schema(
        features=(
            IdFeature(name="user", type="categorical", table="user", linear_only=False),
            IdFeature(name="pair", type="cross", table="pair", linear_only=True),
        ),
        dense=(),
        tables=(Table(name="user", rows=50_000), Table(name="pair", rows=1000)),
        tasks=tuple(TaskColumn(name=task, positive_rate=0.25) for task in tasks),
    )
    schema.write(folder)
    prefixes = [f"{task}/" if len(tasks) > 1 else "" for task in tasks]
    metrics = {f"{p}{k}": 0.71 for p in prefixes for k in ("auc", "logloss", "ne", "calibration", "accuracy")}
    experiment = {"name": name, "model": {"kind": "deepfm"}, "embedding": {"dim": 16}, "etl": {"note": HOSTILE}}
    result = {"steps": 500, "rows": 64_000, "seconds": 12.5, "rows_per_second": 5120.0, "best_step": 400}
    write_json(folder / "experiment.json", experiment)
    write_json(folder / "result.json", {"valid": metrics, "test": metrics, **result})
    lines: list[dict[str, float]] = []
    for step in range(10, 501, 10):
        line = {"step": step, "rows": step * 128, "seconds": step / 40, "loss": 0.4 + 0.3 * np.exp(-step / 80)}
        if step % 100 == 0:
            line |= {f"valid/{p}auc": 0.71 - ((step - 400) / 1000) ** 2 for p in prefixes}
        lines.append(line)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    draw = np.random.default_rng(1)
    columns = {}
    for task in tasks:
        scores = draw.beta(1, 3, rows)
        columns[task] = scores.astype(np.float32)
        columns[f"{task}/label"] = (draw.random(rows) < scores).astype(np.float32)
    write_scores(folder, columns)
    return folder


def write_scores(run: Path, columns: dict[str, npt.NDArray[np.float32]]) -> None:
    (run / "predictions").mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), run / "predictions" / "test.parquet")


def edit(path: Path, change: Callable[[Any], object]) -> None:
    change(value := json.loads(path.read_text()))
    write_json(path, value)


class Page(HTMLParser):
    """The tags of a page, checked to be closed in order, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(self.source)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    def of(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]

    @property
    def text(self) -> str:
        return " ".join(text for tag, text in self.texts if tag != "style")


def test_a_run_has_its_facts_metrics_figures_and_settings(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = write_report([run])
    page = Page(path)
    assert path == run / "report.html"
    assert path.stat().st_size < 300_000
    assert page.of("h1") == ["clicks"]
    assert page.of("dd") == ["64,000", "500", "12.5", "5,120", "400"]
    assert page.of("h3") == FIGURES
    assert "deepfm" in page.of("b")
    assert [cell for cell in page.of("td") if "." in cell][:2] == ["0.7100", "0.7100"]
    assert "The ring is the best step, 400, with 0.7100." in page.text
    at = page.texts.index(("th", "user"))
    assert [text for _, text in page.texts[at : at + 4]] == ["user", "50,000", "20", "4.000"]
    assert [tag for tag, _ in page.tags].count("details") == 1
    assert '"dim": 16' in page.text


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    page = Page(write_report([make_run(tmp_path / "run")]))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "metadata"}
    assert not re.search(r"https?:|@import|//[a-z]|data:", page.source)
    references = [value for _, attrs in page.tags for name, value in attrs.items() if name.endswith(("href", "src"))]
    assert references, "markers and clips are references within the page"
    assert all(str(value).startswith("#") for value in references)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    wanted = {str(value)[1:] for value in references} | set(re.findall(r"url\(#([^)]+)\)", page.source))
    assert wanted <= set(ids)


def test_every_figure_says_what_to_look_at_in_colours_that_the_page_defines(tmp_path: Path) -> None:
    page = Page(write_report([make_run(tmp_path / "run")]))
    labels = [attrs.get("aria-label") or "" for tag, attrs in page.tags if tag == "svg" and attrs.get("role") == "img"]
    assert len(labels) == len(FIGURES)
    assert all(label.startswith(name[:3]) and len(label) > 40 for label, name in zip(labels, FIGURES, strict=True))
    used = set(re.findall(r"var\((--[\w-]+)\)", page.source))
    light, dark = (
        set(re.findall(r"(--[\w-]+):", block)) for block in re.findall(r":root \{(.*?)\}", page.source, re.S)
    )
    assert used <= light == dark
    svgs = "".join(re.findall(r"<svg.*?</svg>", page.source, re.S))
    assert not re.search(r"(fill|stroke): *#", svgs), "a colour that stays the same in the dark"


def test_names_from_the_run_are_text_and_never_tags(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", name=HOSTILE), make_run(tmp_path / "b", name=HOSTILE)]
    for given in (runs[:1], runs):
        page = Page(write_report(given))
        assert "<script" not in page.source
        assert HOSTILE in page.text.replace("  ", " ")
        assert json.dumps(HOSTILE) in page.text


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert write_report([run]).read_bytes() == write_report([run]).read_bytes()


def test_several_runs_are_compared_on_one_page(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, name=name, tasks=("click", "buy")) for name in ("one", "two")]
    edit(runs[1] / "result.json", lambda result: result["test"].update({"buy/auc": 0.81}))
    page = Page(write_report(runs))
    assert page.of("h1") == ["2 runs compared"]
    assert not (runs[1] / "report.html").exists()
    assert page.of("h3")[:4] == FIGURES[:4]
    assert page.of("h3")[4:] == [
        f"Scores by label: {name}" for name in ("one, click", "one, buy", "two, click", "two, buy")
    ]
    assert re.findall('<td class="best">(.*?)</td>', page.source) == ["0.8100"]
    assert page.of("li") == 2 * ["one, click", "one, buy", "two, click", "two, buy"]
    assert {"click/AUC", "buy/AUC"} <= set(page.of("th"))


def test_what_one_class_leaves_undefined_is_said_with_its_reason(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    edit(run / "result.json", lambda r: r["test"].update({"auc": None, "auc_reason": "all labels are 0", "ne": None}))
    write_scores(run, {"click": np.full(100, 0.2, np.float32), "click/label": np.zeros(100, np.float32)})
    page = Page(write_report([run]))
    assert page.of("td").count("undefined") == 2
    assert "all labels are 0" in page.of("small")
    assert "undefined, every label is 0" in page.text
    assert not [name for name in page.of("th") if "reason" in name]


def test_rows_without_a_label_are_left_out_and_a_torn_last_line_is_not_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    labels = np.array([0, 1, np.nan, 1], np.float32)
    write_scores(run, {"click": np.array([0.1, 0.9, 0.5, np.nan], np.float32), "click/label": labels})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 510, "lo')
    assert "positive (1 rows) and negative (1 rows)" in re.sub(" +", " ", Page(write_report([run])).text)


def test_a_run_without_logs_and_labels_has_sentences_instead(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("")
    write_scores(run, {"click": np.zeros(2, np.float32), "click/label": np.full(2, np.nan, np.float32)})
    text = Page(write_report([run])).text
    assert "holds no loss" in text
    assert "undefined, no labelled row" in text


@pytest.mark.parametrize(
    ("name", "remedy"), [("predictions/test.parquet", "python -m recsys evaluate"), ("result.json", "train first")]
)
def test_a_missing_file_is_a_fault_with_its_remedy(tmp_path: Path, name: str, remedy: str) -> None:
    run = make_run(tmp_path / "run")
    (run / name).unlink()
    with pytest.raises(Fault, match=f"{name}.*no such file.*{remedy}"):
        write_report([run])


def test_all_missing_files_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(Faults) as found:
        write_report([make_run(tmp_path / "a"), tmp_path / "b"])
    assert len(found.value.faults) == 5


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("metrics.jsonl", "{}\n", "metrics.jsonl:1"),
        ("result.json", "{}", "result.json: steps: got nothing"),
        ("predictions/test.parquet", "PAR", "wanted a parquet file"),
    ],
)
def test_a_broken_file_is_a_fault_at_its_place(tmp_path: Path, name: str, text: str, told: str) -> None:
    run = make_run(tmp_path / "run")
    (run / name).write_text(text)
    with pytest.raises((Fault, Faults), match=told):
        write_report([run])


def test_absent_prediction_columns_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_scores(run, {"click": np.zeros(3, np.float32)})
    with pytest.raises(Fault, match="'click/label'"):
        write_report([run])


def test_roc_passes_ties_in_one_step_and_its_area_is_the_share_of_ordered_pairs() -> None:
    scores, labels = np.array([0.9, 0.5, 0.5, 0.1]), np.array([1.0, 1.0, 0.0, 0.0])
    false, true = roc_points(scores, labels)
    assert (false.tolist(), true.tolist()) == ([0, 0, 0.5, 1], [0, 0.5, 1, 1])
    assert float((np.diff(false) * (true[1:] + true[:-1]) / 2).sum()) == 3.5 / 4


def test_calibration_bins_hold_equally_many_rows_and_their_intervals_the_true_rate() -> None:
    draw = np.random.default_rng(0)
    scores = draw.random(50_000)
    bins = calibration_bins(scores, (draw.random(50_000) < scores).astype(np.float64))
    np.testing.assert_allclose(bins.predicted, np.arange(0.05, 1, 0.1), atol=0.01)
    assert ((bins.low <= bins.observed) & (bins.observed <= bins.high)).all()
    assert ((bins.low < bins.predicted) & (bins.predicted < bins.high)).sum() >= 8
    # Wilson's interval of 0 in 10 and its mirror image, by hand: 1.96² / (10 + 1.96²).
    few = calibration_bins(np.full(10, 0.3), np.zeros(10))
    assert (len(few.low), few.low[0]) == (1, 0.0)
    assert few.high[0] == pytest.approx(0.27753, abs=1e-4)


def chromium(page: Path, profile: Path, *arguments: str) -> str:
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    more = ["--disable-component-update", "--disable-sync", "--hide-scrollbars", f"--user-data-dir={profile}"]
    command = [str(CHROMIUM), *flags.split(), *more, *arguments, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium to draw the page")
@pytest.mark.parametrize("width", [1100, 500])
def test_a_browser_draws_every_figure_within_the_page(tmp_path: Path, width: int) -> None:
    page = write_report([make_run(tmp_path / "run")])
    shot = tmp_path / "page.png"
    chromium(page, tmp_path / "profile", f"--screenshot={shot}", f"--window-size={width},2600")
    picture = imread(shot)
    assert picture.shape[:2] == (2600, width)
    assert len(np.unique(picture)) > 50, "a blank page"
    # The page itself has no script; this copy writes down what the browser made of it.
    measure = """<script>document.querySelectorAll('figure svg').forEach(svg => {
        const box = svg.getBoundingClientRect();
        svg.dataset.size = [box.width, box.height, box.right].map(Math.round).join(' '); });
        document.body.dataset.width = document.documentElement.scrollWidth</script>"""
    copy = tmp_path / "measured.html"
    copy.write_text(page.read_text().replace("</body>", f"{measure}</body>"))
    dom = chromium(copy, tmp_path / "profile", "--dump-dom", f"--window-size={width},2600")
    sizes = [[int(part) for part in size.split()] for size in re.findall(r'data-size="([^"]+)"', dom)]
    assert len(sizes) == len(FIGURES)
    assert all(wide >= 300 and tall >= 200 and right <= width for wide, tall, right in sizes)
    assert f'data-width="{width}"' in dom, "the page scrolls sideways"
