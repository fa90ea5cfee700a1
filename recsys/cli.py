"""The commands of training."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from etl.faults import exit_on_fault
from etl.options import an_option_for_each_field
from recsys.plan_options import PlanOptions

if TYPE_CHECKING:
    from recsys.experiment import Experiment

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Training on TorchRec: a dataset folder to a run folder with checkpoints, metrics and a report.",
)
ExperimentFile = Annotated[Path, typer.Argument(help="The experiment file, for example experiments/demo.toml.")]
RunFolder = Annotated[Path, typer.Argument(help="A run folder, for example out/demo/run.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Overrides one key: --set train.epochs=3.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def models(*, json_: AsJson = False) -> None:
    """List the models with their papers and settings."""
    from recsys.models import MODELS, default_of

    if json_:
        print(json.dumps({kind: {"paper": m.paper, "config": m.model_json_schema()} for kind, m in MODELS.items()}))
        return
    for kind, model in MODELS.items():
        settings = ", ".join(f"{n} = {default_of(f)}" for n, f in model.model_fields.items() if n != "kind")
        print(f"{kind:14} {model.paper:46} {settings}")


@app.command()
def check(experiment: ExperimentFile, *, set_: Overrides = None) -> None:
    """Report every fault of an experiment file, before any work."""
    with exit_on_fault():
        found = _load(experiment, set_)
        print(f"{experiment}: experiment '{found.name}', model '{found.model.kind}', no faults")


@app.command()
def train(
    experiment: ExperimentFile,
    *,
    run: Annotated[
        Path | None,
        typer.Option("--run", "--run-dir", help="The run folder; default out/<name>/run. torchrun needs --run-dir."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="The dataset folder; default out/<name>/data.")] = None,
    set_: Overrides = None,
) -> None:
    """Train; the same command goes on after a crash. Under torchrun it trains on all processes together.

    With --set train.start_from=RUN a finished run's tables, head and optimizer states are where it starts; with
    --set train.tensorboard=true it writes event files as well.
    """
    with exit_on_fault():
        from recsys.progress import quiet_libraries, watch

        quiet_libraries()
        from recsys.machine import keep_memory, slow_precision, slow_tables
        from recsys.train import train as run_training

        found = _load(experiment, set_)
        keep_memory()
        for note in filter(None, (slow_precision(found.train), slow_tables(found.train))):
            print(note, file=sys.stderr)
        out = Path("out") / found.name
        run = run or out / "run"
        with watch() as report:
            result = run_training(found, data=data or out / "data", run=run, report=report)
        if os.environ.get("RANK", "0") == "0":
            print(f"{run}: best step {result['best_step']}, {_line(result['test'], 'test')}")


@app.command()
def evaluate(
    run: RunFolder,
    *,
    split: Annotated[str, typer.Option(help="train, valid or test.")] = "test",
    data: Annotated[Path | None, typer.Option(help="The dataset folder; default beside the run.")] = None,
    json_: AsJson = False,
) -> None:
    """Measure the best checkpoint on a split, also under torchrun."""
    with exit_on_fault():
        from recsys.progress import quiet_libraries

        quiet_libraries()
        from recsys.evaluate import evaluate as run_evaluation

        metrics = run_evaluation(run, data=data, split=split)
        if metrics is not None:
            print(json.dumps(metrics) if json_ else f"{run}: {_line(metrics, split)}")


@app.command()
def replay(
    run: RunFolder,
    failure: Annotated[Path, typer.Argument(help="A folder below RUN/failures.")],
) -> None:
    """Compute the losses of the batch that stopped a run again, from what was kept of it."""
    with exit_on_fault():
        from recsys.progress import quiet_libraries

        quiet_libraries()
        from recsys.failure import replay_text

        print(replay_text(run, failure))


@app.command()
def predict(
    run: RunFolder,
    *,
    input_: Annotated[Path, typer.Option("--input", help="Raw rows: a .parquet or .jsonl file.")],
    output: Annotated[Path, typer.Option("--output", help="The parquet file to write: one column a task.")],
) -> None:
    """Score raw rows offline."""
    with exit_on_fault():
        from recsys.progress import quiet_libraries

        quiet_libraries()
        from recsys.predict import predict as run_prediction

        print(f"{output}: {run_prediction(run, rows=input_, output=output):,} rows")


@app.command("plan")
@an_option_for_each_field(PlanOptions)
def _plan(experiment: ExperimentFile, **options: Any) -> None:
    """Say which rank will hold what and in how much memory, for hardware that need not be there."""
    with exit_on_fault():
        from recsys.progress import quiet_libraries

        quiet_libraries()
        from recsys.plan import as_json, as_text, plan_for, write_picture

        chosen = PlanOptions(**options)
        found = plan_for(_load(experiment, [*chosen.overrides(), *(chosen.set or [])]), chosen)
        if chosen.picture:
            write_picture(found, chosen.picture)
        print(json.dumps(as_json(found)) if chosen.json else as_text(found))


@app.command()
def report(runs: Annotated[list[Path], typer.Argument(help="Run folders; the first receives the page.")]) -> None:
    """Write report.html: curves, ROC, calibration, score histogram, table sizes."""
    with exit_on_fault():
        from recsys.report import write_report

        print(write_report(runs))


def _load(path: Path, overrides: list[str] | None) -> "Experiment":
    from etl.experiment_file import load
    from recsys.experiment import Experiment

    return load(path, overrides=overrides or [], into=Experiment)


def _line(metrics: dict[str, Any], split: str) -> str:
    shown = ("auc", "logloss", "ne", "calibration", "accuracy", "gauc")
    found = {name: metrics[name] for name in metrics if name.split("/")[-1] in shown}
    figures = [f"{name} {value:.4f}" for name, value in found.items() if isinstance(value, float)]
    return f"{split}: {', '.join(figures)}"
