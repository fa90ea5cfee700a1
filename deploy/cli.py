"""The commands of serving."""

from pathlib import Path
from typing import Annotated

import typer

from etl.faults import exit_on_fault

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serving on Triton: export a run, serve the bundle, score raw rows, compare served with offline scores.",
)
BundleFolder = Annotated[Path, typer.Argument(help="A bundle folder, for example out/demo/bundle.")]
Url = Annotated[str, typer.Option(help="The server's gRPC address, HOST:PORT.")]


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder, for example out/demo/run.")],
    *,
    out: Annotated[Path | None, typer.Option(help="The bundle folder; default beside the run.")] = None,
    data: Annotated[Path | None, typer.Option(help="The dataset folder; default beside the run.")] = None,
    tables: Annotated[str | None, typer.Option(help="fp32, fp16 or int8; default: the experiment's.")] = None,
    dense: Annotated[str | None, typer.Option(help="fp32 or bf16; default: the experiment's.")] = None,
    compile_: Annotated[
        str | None, typer.Option("--compile", help="auto, off, x86-64-v3 or x86-64-v4; default: the experiment's.")
    ] = None,
) -> None:
    """Write a bundle: weights, program, transform and golden requests. Refused where its scores are not the run's.

    Prints what each precision costs on the validation rows.
    """
    with exit_on_fault():
        from recsys.progress import quiet_libraries

        quiet_libraries()
        from deploy.export import export as run_export
        from deploy.precision import cost_lines

        folder = out or run.parent / "bundle"
        given = {"tables": tables, "dense": dense, "compile": compile_}
        overrides = {name: value for name, value in given.items() if value is not None}
        bundle = run_export(run, folder, data=data, overrides=overrides)
        for line in cost_lines(bundle.costs):
            print(line)
        print(f"{folder}: step {bundle.step}, {len(bundle.files)} files, scores equal within {bundle.tolerance:g}")
        print(f"  quantization: {bundle.quantization}; native code: {bundle.isa}")


@app.command()
def serve(
    bundle: BundleFolder,
    *,
    grpc_port: Annotated[int | None, typer.Option(help="Default: the experiment's, else a free one.")] = None,
    http_port: Annotated[int | None, typer.Option(help="Default: the experiment's, else a free one.")] = None,
    instances: Annotated[
        int | None, typer.Option(min=1, help="Copies of the model; default: the experiment's.")
    ] = None,
    state: Annotated[Path | None, typer.Option(help="JSON with ports while ready; default server.json beside.")] = None,
) -> None:
    """Serve on the loopback interface until Ctrl-C or SIGTERM; a dead server or model process is started again."""
    with exit_on_fault():
        from deploy.serve import serve as run_server
        from deploy.server import Endpoint

        def ready(endpoint: Endpoint) -> None:
            print(f"serving {bundle} as '{endpoint.model}' on {endpoint.host}")
            print(f"  gRPC {endpoint.grpc_port}, HTTP {endpoint.http_port}, metrics {endpoint.metrics_port}")
            print(f"  log {endpoint.log}", flush=True)

        state = state or bundle.resolve().parent / "server.json"
        run_server(bundle, state=state, grpc_port=grpc_port, http_port=http_port, instances=instances, ready=ready)


@app.command()
def score(
    *,
    url: Url,
    input_: Annotated[Path, typer.Option("--input", help="Raw rows: a .parquet or .jsonl file.")],
    output: Annotated[Path, typer.Option("--output", help="The parquet file to write: one column a task.")],
) -> None:
    """Score raw rows online."""
    with exit_on_fault():
        from deploy.client import Client
        from etl.artifact import write_parquet
        from etl.sources import read_rows

        with Client(url) as client:
            table = client.score(read_rows(input_, client.columns)).table()
        write_parquet(output, table)
        print(f"{output}: {table.num_rows:,} rows")


@app.command()
def verify(
    bundle: BundleFolder,
    *,
    url: Url,
    input_: Annotated[
        Path | None, typer.Option("--input", help="Raw rows to compare instead of the test split.")
    ] = None,
) -> None:
    """Compare served with offline scores, row by row; exit code 1 where one differs."""
    with exit_on_fault():
        from recsys.progress import quiet_libraries

        quiet_libraries()
        from deploy.verify import verify as run_verification

        wrong = 0
        for comparison in run_verification(bundle, url=url, rows=input_):
            print(comparison)
            wrong += comparison.rows - comparison.equal
        if wrong:
            raise SystemExit(1)
