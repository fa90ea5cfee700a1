"""The commands of serving."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.bench_options import BenchOptions
from etl.faults import exit_on_fault
from etl.options import an_option_for_each_field

if TYPE_CHECKING:
    from deploy.bundle import Cost
    from deploy.control import Server

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serving on Triton: export a run, serve the bundle, score raw rows, compare served with offline scores.",
)
BundleFolder = Annotated[Path, typer.Argument(help="A bundle folder, for example out/demo/bundle.")]
Repository = Annotated[Path, typer.Option(help="The Triton repository, for example out/demo/repository.")]
KeyFile = Annotated[
    Path | None, typer.Option(help="Key of the server's model control; default server/admin.key beside the repository.")
]
Tls = Annotated[
    Path | None, typer.Option(help="Folder with ca.crt, and tls.crt and tls.key for mutual TLS; default: plain gRPC.")
]
ServerUrls = Annotated[
    list[str] | None,
    typer.Option("--url", help="gRPC address of a server that serves it, HOST:PORT; once for each of several."),
]
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

    Prints what each precision costs on the validation rows, and what of the network it leaves finer, refused or not.
    """
    with exit_on_fault():
        from recsys.progress import quiet_libraries

        quiet_libraries()
        from deploy.export import export as run_export
        from deploy.precision import cost_lines

        def show(found: "Sequence[Cost]") -> None:
            print(*cost_lines(found), sep="\n", flush=True)

        folder = out or run.parent / "bundle"
        given = {"tables": tables, "dense": dense, "compile": compile_}
        overrides = {name: value for name, value in given.items() if value is not None}
        bundle = run_export(run, folder, data=data, overrides=overrides, tell=show)
        print(f"{folder}: step {bundle.step}, {len(bundle.files)} files, scores equal within {bundle.tolerance:g}")
        print(f"  quantization: {bundle.quantization}; native code: {bundle.isa}")


@app.command()
def serve(
    bundle: Annotated[Path, typer.Argument(help="A bundle, or a repository that bundles were published into.")],
    *,
    grpc_port: Annotated[int | None, typer.Option(help="Default: the experiment's, else a free one.")] = None,
    http_port: Annotated[int | None, typer.Option(help="Default: the experiment's, else a free one.")] = None,
    instances: Annotated[
        int | None, typer.Option(min=1, help="Copies of the model; default: the experiment's.")
    ] = None,
    state: Annotated[Path | None, typer.Option(help="JSON with ports while ready; default server.json beside.")] = None,
    network: Annotated[
        Path | None, typer.Option(help="TOML with host, i_know, tls; default: loopback, plain text.")
    ] = None,
) -> None:
    """Serve on the loopback interface until Ctrl-C or SIGTERM; a dead server or model process is started again."""
    with exit_on_fault():
        from deploy.network import Network, read_network
        from deploy.serve import Wanted
        from deploy.serve import serve as run_server
        from deploy.server import Endpoint

        def ready(endpoint: Endpoint) -> None:
            print(f"serving {bundle} as '{endpoint.model}' on {endpoint.host}")
            print(f"  gRPC {endpoint.grpc_port}, HTTP {endpoint.http_port}, metrics {endpoint.metrics_port}")
            print(f"  log {endpoint.log}, key of model control {endpoint.key_file}", flush=True)

        state = state or bundle.resolve().parent / "server.json"
        wanted = Wanted(grpc_port, http_port, instances, read_network(network) if network else Network())
        run_server(bundle, wanted, state=state, ready=ready)


@app.command()
def publish(
    bundle: BundleFolder,
    *,
    repo: Repository,
    url: ServerUrls = None,
    key_file: KeyFile = None,
    tls: Tls = None,
    keep: Annotated[int, typer.Option(min=1, help="Versions to keep, the served one among them.")] = 3,
) -> None:
    """Make a bundle the served version: tried on its golden requests first, then swapped in without a failed request.

    A bundle that does not load or does not score as offline leaves all as it was, with exit code 2.
    """
    with exit_on_fault():
        from recsys.progress import quiet_libraries

        quiet_libraries()
        from deploy.publish import publish as run_publication

        done = run_publication(bundle, repo, servers=_servers(url, repo=repo, key_file=key_file, tls=tls), keep=keep)
        before = f"before: {done.before}" if done.before else "the first"
        print(f"{repo}: version {done.version} is served ({before}), kept {', '.join(map(str, done.kept))}")


@app.command()
def rollback(
    *,
    repo: Repository,
    url: ServerUrls = None,
    key_file: KeyFile = None,
    tls: Tls = None,
) -> None:
    """Serve the version before the present one again; the present one is removed."""
    with exit_on_fault():
        from recsys.progress import quiet_libraries

        quiet_libraries()
        from deploy.publish import rollback as run_rollback

        done = run_rollback(repo, servers=_servers(url, repo=repo, key_file=key_file, tls=tls))
        print(f"{repo}: version {done.version} is served again, version {done.before} is removed")


@app.command()
def score(
    *,
    url: Url,
    input_: Annotated[Path, typer.Option("--input", help="Raw rows: a .parquet or .jsonl file.")],
    output: Annotated[Path, typer.Option("--output", help="The parquet file to write: one column a task.")],
    tls: Tls = None,
) -> None:
    """Score raw rows online."""
    with exit_on_fault():
        from deploy.client import Client
        from etl.artifact import write_parquet
        from etl.sources import read_rows

        with Client(url, tls=tls) as client:
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
    tls: Tls = None,
) -> None:
    """Compare served with offline scores, row by row; exit code 1 where one differs."""
    with exit_on_fault():
        from recsys.progress import quiet_libraries

        quiet_libraries()
        from deploy.verify import verify as run_verification

        wrong = 0
        for comparison in run_verification(bundle, url=url, rows=input_, tls=tls):
            print(comparison)
            wrong += comparison.rows - comparison.equal
        if wrong:
            raise SystemExit(1)


@app.command("bench")
@an_option_for_each_field(BenchOptions)
def _bench(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle: served here, beside an empty model.")] = None,
    **options: Any,
) -> None:
    """Measure latencies, rows/s and CPU time a row; with a bundle also those of an empty model and of eager scoring."""
    with exit_on_fault():
        from recsys.progress import quiet_libraries

        quiet_libraries()
        from deploy.bench import Load
        from deploy.bench_bundle import bench_bundle, bench_server, write_results

        chosen = BenchOptions(**options)
        chosen.refuse_two_places(bundle)
        load = Load(chosen.concurrency, chosen.rate, tls=chosen.tls)
        if bundle is not None:
            results = bench_bundle(bundle, rows=chosen.rows, load=load, ranked=chosen.ranked)
        else:
            results = bench_server(str(chosen.url), rows=chosen.rows, load=load, ranked=chosen.ranked)
        print(chosen)
        print(f"{'':18}{'rows/s':>10}{'p50 ms':>9}{'p95 ms':>9}{'p99 ms':>9}{'CPU us/row':>12}{'failed':>8}")
        for each in results:
            cpu = "" if each.cpu_us_per_row is None else f"{each.cpu_us_per_row:.2f}"
            times = "".join(f"{value:9.2f}" for value in (each.p50_ms, each.p95_ms, each.p99_ms))
            print(f"{each.side:18}{each.rows_per_s:10,.0f}{times}{cpu:>12}{each.failed:8,}")
        if chosen.out is not None:
            write_results(chosen.out, results, about={"rows": chosen.rows, "ranked": chosen.ranked}, load=load)


def _servers(urls: list[str] | None, *, repo: Path, key_file: Path | None, tls: Path | None) -> "list[Server]":
    from deploy.control import Server
    from deploy.server import KEY_FILE

    default = repo.resolve().parent / "server" / KEY_FILE
    return [Server(url, key_file or default, tls) for url in urls or []]
