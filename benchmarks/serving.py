"""DeepFM on Triton beside the same program in process, and an eager EmbeddingBagCollection in the same server.

26 ids and 13 numbers, 3,000,000 rows x 16 in 26 hashed tables, three layers of 400. The bundle is made by the ordinary
commands from clicks of `etl synth`; the network is trained for one epoch of few rows, since its weights cost nothing.
The sides take turns in one run, one thread each; figures are medians of many short rounds, since what else a machine
does changes CPU time too. CPU time through Triton is that of the server and its stubs; the load comes from this
process, on the same cores, so it comes through HTTP from one thread, which takes a fifth of the time of Python's gRPC.
Sides have one instance unless they say how many.

The last line is a JSON object: `triton_over_inprocess_512` is CPU time a row through Triton over that of the same
transform and program in this process, `triton_over_program_512` over the program's alone, both in fp32 at 512 rows and
one client; `bf16_over_fp32_512` compares rows/s of the two precisions there, and is null on a CPU without bfloat16.
At 64 rows and 8 clients, `rows_per_s_vs_eager_64x8` compares rows/s of what one would serve, bf16 where the CPU has it
and as many instances as cores, with the eager fp32 model of one instance; `grpc_vs_eager_64x8` does so through gRPC,
`fp32_vs_eager_64x8` and `best_vs_eager_64x8` with one instance on either side, and `instances_vs_eager_64x8` with as
many as cores on either side; `cpu_vs_eager_64x8` is the eager model's CPU time a row over that of the best precision,
both of one instance, `echo_share_64x8` the empty model's share of our fp32 one. The others are those of
benchmarks/serving_instances.py.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import etl.transform  # noqa: E402
from benchmarks.load.closed_http import http_requests, load_http  # noqa: E402
from benchmarks.serving_instances import command, two_instances  # noqa: E402
from deploy import ranker  # noqa: E402
from deploy.bench import Load, Measured, load_server, requests_of, run_in_process  # noqa: E402
from deploy.bench_bundle import ECHO, add_echo, packed_rows  # noqa: E402
from deploy.bundle import MODEL, read_bundle  # noqa: E402
from deploy.repository import make_repository  # noqa: E402
from deploy.served_program import load_program  # noqa: E402
from deploy.server import EmbeddedServer, Endpoint, ServerOptions  # noqa: E402
from etl.transform import Packed  # noqa: E402

EAGER = "eager"
CORES = os.cpu_count() or 1
EXPERIMENT = """
name = "serving"
seed = 1
[data]
format = "parquet"
train = ["{folder}/raw/day_0.parquet"]
valid = ["{folder}/raw/day_1.parquet"]
test = ["{folder}/raw/day_2.parquet"]
[[tasks]]
name = "label"
[[features]]
type = "categorical"
columns = {ids}
hash_rows = {hash_rows}
[[features]]
type = "numeric"
columns = {numbers}
fill = 0.0
clip = [0.0, 1e6]
log1p = true
[model]
kind = "deepfm"
hidden = [400, 400, 400]
[embedding]
dim = 16
[train]
batch_size = 512
epochs = 1
"""
EAGER_MODEL = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from deploy.offline import offline_run
from etl.transform import Packed
from recsys.predict import probabilities


class TritonPythonModel:
    def initialize(self, args):
        torch.set_num_threads(1)
        self.network, self.transform = offline_run(Path({run!r}))

    def execute(self, requests):
        keys = [pb_utils.get_input_tensor_by_name(each, "keys").as_numpy() for each in requests]
        numbers = [pb_utils.get_input_tensor_by_name(each, "numbers").as_numpy() for each in requests]
        encoded = self.transform.apply(Packed(np.concatenate(keys), np.concatenate(numbers)))
        score = probabilities(self.network, encoded)
        parts = np.split(score, np.cumsum([len(each) for each in keys])[:-1])
        return [pb_utils.InferenceResponse([pb_utils.Tensor("score", part)]) for part in parts]
"""


def main() -> None:
    """Makes the bundle, serves it, measures in turns, prints a table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each side in a round")
    parser.add_argument("--quick", action="store_true", help="small tables, one short round: shows that it works")
    options = parser.parse_args()
    rounds, seconds = (1, 0.5) if options.quick else (options.rounds, options.seconds)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="serving-benchmark-") as scratch:
        folder = Path(scratch)
        bundle = make_bundle(folder, table_rows=26_000 if options.quick else 3_000_000, dense="fp32")
        half = make_bundle(folder, table_rows=0, dense="bf16") if has_bfloat16() else None
        if half is None:
            print("bf16 over fp32: skipped, this CPU has neither AVX512-BF16 nor AMX-BF16")
        figures = compare(folder, bundle, half=half, rounds=rounds, seconds=seconds)
        figures |= two_instances(folder, bundle)
    print(json.dumps(figures))


def make_bundle(folder: Path, *, table_rows: int, dense: str) -> Path:
    """The bundle of this precision; rows, dataset and run are made with the first one."""
    bundle = folder / f"bundle-{dense}"
    if table_rows:
        ids, numbers = [f"C{at}" for at in range(1, 27)], [f"I{at}" for at in range(1, 14)]
        text = EXPERIMENT.format(
            folder=folder, ids=json.dumps(ids), numbers=json.dumps(numbers), hash_rows=table_rows // 26
        )
        (folder / "serving.toml").write_text(text, encoding="utf-8")
        command(folder, "etl", "synth", "raw", "--rows", "24000", "--days", "3", "--seed", "1", "--format", "parquet")
        command(folder, "etl", "run", "serving.toml", "--out", "data")
        command(folder, "recsys", "train", "serving.toml", "--data", "data", "--run", "run")
    precision = [] if dense == "fp32" else ["--dense", dense]
    command(folder, "deploy", "export", "run", "--out", str(bundle), *precision)
    return bundle


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; without, the figure would say nothing."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return "avx512_bf16" in flags or "amx_bf16" in flags


def compare(folder: Path, bundle: Path, *, half: Path | None, rounds: int, seconds: float) -> dict[str, float | None]:
    """Ratios of medians over the rounds."""
    packed = packed_rows(bundle, read_bundle(bundle))
    whole, program = in_process(bundle, packed, rows=512)
    found: dict[str, list[Measured]] = {}

    def note(measured: Measured) -> None:
        found.setdefault(measured.side, []).append(measured)
        cpu_us = measured.cpu_us_per_row or 0.0
        print(
            f"{measured.side:32}{measured.rows_per_s:12,.0f} rows/s{measured.p50_ms:9.2f} ms{cpu_us:10.2f} CPU-us/row"
        )

    one, many, best = Load(1, seconds=seconds), Load(8, seconds=seconds), "bf16" if half else "fp32"
    with ExitStack() as servers:
        server = servers.enter_context(serving(folder / "served", bundle))
        lower = servers.enter_context(serving(folder / "half", half)) if half else server
        wide = servers.enter_context(serving(folder / "wide", half or bundle, instances=CORES))
        for _ in range(rounds):
            for side, score in (("in process, transform + program", whole), ("in process, program", program)):
                note(run_in_process(score, rows=512, seconds=seconds, side=side))
            note(sent(server, packed, model=MODEL, rows=512, load=one, side="fp32 512 x 1"))
            note(sent(server, packed, model=EAGER, rows=512, load=one, side="eager 512 x 1"))
            if half:
                note(sent(lower, packed, model=MODEL, rows=512, load=one, side="bf16 512 x 1"))
                note(sent(lower, packed, model=MODEL, rows=64, load=many, side="bf16 64 x 8"))
            note(sent(server, packed, model=MODEL, rows=64, load=many, side="fp32 64 x 8"))
            note(sent(server, packed, model=EAGER, rows=64, load=many, side="eager 64 x 8"))
            note(sent(server, packed, model=ECHO, rows=64, load=many, side="echo 64 x 8"))
            note(sent(wide, packed, model=MODEL, rows=64, load=many, side=f"{best} 64 x 8, instances {CORES}"))
            note(sent(wide, packed, model=EAGER, rows=64, load=many, side=f"eager 64 x 8, instances {CORES}"))
            note(sent_grpc(wide, packed, model=MODEL, rows=64, load=many, side=f"{best} gRPC, instances {CORES}"))
            note(sent_grpc(server, packed, model=EAGER, rows=64, load=many, side="eager gRPC"))
    return ratios(found, best=best)


def ratios(found: Mapping[str, Sequence[Measured]], *, best: str) -> dict[str, float | None]:
    """Of medians; `best` is the precision that one would serve on this CPU."""
    cpu_us = {side: median(each.cpu_us_per_row or 0.0 for each in all_) for side, all_ in found.items()}
    speed = {side: median(each.rows_per_s for each in all_) for side, all_ in found.items()}
    for side in found:
        print(f"median of {side:32}{speed[side]:12,.0f} rows/s{cpu_us[side]:19.2f} CPU-us/row")
    wide, eager = f"{best} 64 x 8, instances {CORES}", speed["eager 64 x 8"]
    values = {
        "triton_over_inprocess_512": cpu_us["fp32 512 x 1"] / cpu_us["in process, transform + program"],
        "triton_over_program_512": cpu_us["fp32 512 x 1"] / cpu_us["in process, program"],
        "rows_per_s_vs_eager_64x8": speed[wide] / eager,
        "fp32_vs_eager_64x8": speed["fp32 64 x 8"] / eager,
        "best_vs_eager_64x8": speed[f"{best} 64 x 8"] / eager,
        "grpc_vs_eager_64x8": speed[f"{best} gRPC, instances {CORES}"] / speed["eager gRPC"],
        "instances_vs_eager_64x8": speed[wide] / speed[f"eager 64 x 8, instances {CORES}"],
        "cpu_vs_eager_64x8": cpu_us["eager 64 x 8"] / cpu_us[f"{best} 64 x 8"],
        "echo_share_64x8": cpu_us["echo 64 x 8"] / cpu_us["fp32 64 x 8"],
    }
    lower = speed["bf16 512 x 1"] / speed["fp32 512 x 1"] if best == "bf16" else None
    return {name: round(value, 2) for name, value in values.items()} | {
        "bf16_over_fp32_512": lower and round(lower, 2),
        "instances": CORES,
    }


def in_process(bundle: Path, packed: Packed, *, rows: int) -> tuple[Callable[[int], None], Callable[[int], None]]:
    """What a stub does with one request, and its program alone: both take the request's number."""
    program = load_program(bundle)
    served = ranker.Ranker(bundle, etl.transform, program=program)
    starts = range(0, len(packed.keys) - rows + 1, rows)
    requests = [ranker.Request(packed.keys[at : at + rows], packed.numbers[at : at + rows]) for at in starts]
    transform = etl.transform.Transform.load(bundle / "transform")
    encoded = [transform.apply(Packed(each.keys, each.numbers)) for each in requests]
    tensors = [(torch.from_numpy(each.ids), torch.from_numpy(each.floats)) for each in encoded]

    def whole(at: int) -> None:
        served.score([requests[at % len(requests)]])

    def alone(at: int) -> None:
        with torch.inference_mode():
            program(*tensors[at % len(tensors)])

    return whole, alone


@contextmanager
def serving(folder: Path, bundle: Path, *, instances: int = 1) -> Iterator[Endpoint]:
    """The bundle, an echo and the eager network in one server, so many instances of each."""
    repository = folder / "repository"
    made = make_repository(bundle, repository, instances=instances)
    add_echo(repository, tasks=len(made.tasks))
    config = (repository / ECHO / "config.pbtxt").read_text(encoding="utf-8")
    (repository / EAGER / "1").mkdir(parents=True)
    (repository / EAGER / "config.pbtxt").write_text(config.replace(f'"{ECHO}"', f'"{EAGER}"'))
    (repository / EAGER / "1" / "model.py").write_text(EAGER_MODEL.format(root=str(ROOT), run=made.run))
    options = ServerOptions(repository=repository, model=MODEL, others=(ECHO, EAGER), log_dir=folder / "server")
    with EmbeddedServer(options) as server:
        yield server.start()


def sent(server: Endpoint, packed: Packed, *, model: str, rows: int, load: Load, side: str) -> Measured:
    """One side through Triton. CPU time counts the server and all stubs: those of idle models take none."""
    return load_http(server, http_requests(packed, model, rows=rows), rows=rows, load=load, side=side)


def sent_grpc(server: Endpoint, packed: Packed, *, model: str, rows: int, load: Load, side: str) -> Measured:
    """The same through Python's gRPC, as the load test and the client do it."""
    return load_server(
        server.url, requests_of(packed, model, rows=rows), rows=rows, load=load, side=side, pid=server.pid
    )


if __name__ == "__main__":
    main()
