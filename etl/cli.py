"""The commands of the ETL."""

import contextlib
import gc
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from etl.faults import exit_on_fault, exit_on_termination
from etl.options import an_option_for_each_field
from etl.progress import Progress
from etl.synth.options import Options

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Feature ETL: raw rows to parquet shards, a schema and a fitted transform.",
)


@app.command()
def run(
    experiment: Annotated[Path, typer.Argument(help="The experiment file, for example experiments/demo.toml.")],
    *,
    engine: Annotated[str | None, typer.Option(help="Overrides etl.engine.")] = None,
    out: Annotated[Path | None, typer.Option(help="The dataset folder; default out/<name>/data.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Overrides one key: --set data.split.seed=7.")] = None,
    extend: Annotated[
        Path | None, typer.Option(help="A dataset folder whose tables and counts go on from here.")
    ] = None,
    refit_numbers: Annotated[bool, typer.Option(help="With --extend: fill and scale by the new rows alone.")] = False,
) -> None:
    """Fit the transform on the training rows and encode all splits.

    A folder that was made from the same sections of the experiment and the same raw files is left as it is.
    With --extend the experiment names new training files: new values get new rows, no older row moves.
    """
    gc.set_threshold(100_000)  # a large job makes few cycles; looking for them took a tenth of its time
    with exit_on_fault(), exit_on_termination():
        from etl.artifact import recover
        from etl.experiment_file import load_feature_spec
        from etl.extend import added_rows, read_parent
        from etl.run import run as run_etl
        from etl.run import up_to_date

        overrides = [*(set_ or []), *([f"etl.engine={engine}"] if engine else [])]
        name, spec = load_feature_spec(experiment, overrides=overrides)
        folder = out or Path("out") / name / "data"
        for place in (folder, extend or folder):
            recover(place)
        parent = read_parent(spec, extend, refit_numbers=refit_numbers)
        if up_to_date(spec, folder, parent=parent):
            print(f"{folder}: up to date")
            return
        on_polars = spec.etl.engine == "polars" and spec.etl.device == "cpu"
        with Progress() as report, _without("pandas", "scipy", "yaml") if on_polars else contextlib.nullcontext():
            manifest = run_etl(spec, folder, report=report, parent=parent)
        rows = ", ".join(f"{split} {s['rows']:,}" for split, s in manifest["splits"].items())
        print("\n".join([f"{folder}: {rows} rows", *added_rows(manifest)]))
    gc.freeze()  # or all that was imported is looked through once more at the exit, for a fifth of a second


class _Absent(MetaPathFinder):
    """Says that some packages are not installed."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def find_spec(self, fullname: str, *_: object) -> None:
        if fullname in self._names:
            raise ModuleNotFoundError(fullname)


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    """Pyarrow looks for pandas, numba for scipy and yaml: where these are installed, a small job waits for them."""
    sys.meta_path.insert(0, hidden := _Absent(names))
    try:
        yield
    finally:
        sys.meta_path.remove(hidden)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A dataset folder, for example out/demo/data.")],
    *,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    html: Annotated[
        Path | None, typer.Option(help="The page; default inspect.html beside DIR, and none with --json.")
    ] = None,
) -> None:
    """Show rows, label rates, table sizes, missing and unseen shares, and drift between the splits.

    The page adds label rates by day or raw file and along the splits, most frequent values, coverage and histograms.
    """
    with exit_on_fault():
        from etl.inspect import inspect as inspect_folder
        from etl.inspect_page import write_page

        found = inspect_folder(folder)
        page = html or (None if json_ else folder.resolve().parent / "inspect.html")
        if page:
            write_page(found, page)
        print(json.dumps(found)) if json_ else _print_tables(found)
        if page and not json_:
            print(f"page: {page}")


@app.command()
def locate(
    folder: Annotated[Path, typer.Argument(help="A dataset folder, for example out/demo/data.")],
    split: Annotated[str, typer.Argument(help="train, valid or test.")],
    *,
    rows: Annotated[list[int], typer.Argument(help="Rows of it, counted from 0 over its shards, as predictions are.")],
) -> None:
    """Name the raw file that rows of a split come from, and the row in it, counted from 1.

    Header, comments and empty lines are no rows.
    """
    with exit_on_fault():
        from etl.origin import locate as locate_rows

        print("\n".join(locate_rows(folder, split, numbers=rows)))


def _print_tables(found: dict[str, Any]) -> None:
    from rich.console import Console

    splits = [{"split": name, "rows": part["rows"]} | part["label_rate"] for name, part in found["splits"].items()]
    ids = [{key: f[key] for key in ("name", "rows", "missing", "unseen", "psi")} for f in found["features"]]
    dense = [{key: f[key] for key in ("name", "missing", "mean", "std", "min", "max", "psi")} for f in found["dense"]]
    console = Console()
    console.print(_table("splits", splits))
    console.print(
        _table("id features: table rows, shares of missing and unseen values, drift from training (PSI)", ids)
    )
    console.print(_table("dense features after scaling: shares of missing values, drift from training (PSI)", dense))


@app.command("synth")
@an_option_for_each_field(Options)
def _synth(
    out: Annotated[Path, typer.Argument(help="The folder to write; an older one of this kind is replaced.")],
    **options: Any,
) -> None:
    """Write clicks with a known signal, and the AUC that their true probabilities reach.

    OUT gets day_0, day_1, ... in the order of time, truth/ with the probabilities of each row, and truth.json.
    """
    with exit_on_fault(), exit_on_termination():
        from etl.synth.write import synth

        with Progress() as report:
            report("write", 0, total=options["rows"])
            found = synth(out, Options(**options), report=partial(report, total=options["rows"]))
        print(f"{out}: {found['rows']:,} rows, seed {found['seed']}")
        for task, auc in found["auc"].items():
            reached = "undefined, all labels are equal" if auc is None else f"{auc:.4f}"
            print(f"{task}: rate {found[f'{task}_rate']:.4f}, AUC of the true probabilities {reached}")


def _table(title: str, rows: list[dict[str, Any]]) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for name in rows[0] if rows else []:
        of = f"\n{' '.join(rows[0][name])}" if isinstance(rows[0][name], dict) else ""
        left = isinstance(rows[0][name], str)
        table.add_column(name.replace("_", " ") + of, justify="left" if left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    return table


def _cell(value: object) -> str:
    if isinstance(value, dict):
        return " ".join("–" if part is None else f"{part:.3f}".replace("0.", ".", 1) for part in value.values())
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
