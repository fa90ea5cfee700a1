"""The commands of the ETL."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from etl.faults import exit_on_fault

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
    with exit_on_fault():
        from etl.experiment_file import load_feature_spec
        from etl.extend import added_rows, read_parent
        from etl.run import run as run_etl
        from etl.run import up_to_date

        overrides = [*(set_ or []), *([f"etl.engine={engine}"] if engine else [])]
        name, spec = load_feature_spec(experiment, overrides=overrides)
        folder = out or Path("out") / name / "data"
        parent = read_parent(spec, extend, refit_numbers=refit_numbers)
        if up_to_date(spec, folder, parent=parent):
            print(f"{folder}: up to date")
            return
        with _Progress() as report:
            manifest = run_etl(spec, folder, report=report, parent=parent)
        rows = ", ".join(f"{split} {s['rows']:,}" for split, s in manifest["splits"].items())
        print("\n".join([f"{folder}: {rows} rows", *added_rows(manifest)]))


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A dataset folder, for example out/demo/data.")],
    *,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show rows, label rates, table sizes, missing and unseen shares, and drift between the splits."""
    with exit_on_fault():
        from etl.inspect import inspect as inspect_folder

        found = inspect_folder(folder)
        if json_:
            print(json.dumps(found))
            return
        from rich.console import Console

        console = Console()
        console.print(
            _table("splits", [{"split": k, "rows": v["rows"]} | v["label_rate"] for k, v in found["splits"].items()])
        )
        console.print(
            _table(
                "id features: table rows, shares of missing and unseen values, drift from training (PSI)",
                found["features"],
            )
        )
        console.print(_table("dense features after scaling, drift from training (PSI)", found["dense"]))


class _Progress:
    """One line a stage with rows and rows/s; on a terminal it moves, elsewhere nothing is printed until the end."""

    def __enter__(self) -> "_Progress":
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed:,} rows"))
        rate = TextColumn("{task.fields[rate]:,.0f} rows/s")
        self._bar = Progress(*columns, rate, TimeElapsedColumn(), console=Console(stderr=True), transient=True)
        self._stages: dict[str, Any] = {}
        self._bar.start()
        return self

    def __call__(self, stage: str, rows: int) -> None:
        if stage not in self._stages:
            self._stages[stage] = self._bar.add_task(stage, total=None, rate=0.0)
        task = self._bar.tasks[self._stages[stage]]
        self._bar.update(task.id, completed=rows, rate=rows / max(task.elapsed or 0.0, 1e-3))

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


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
        return " ".join(f"{part:.3f}".replace("0.", ".", 1) for part in value.values())
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
