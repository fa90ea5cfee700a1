"""The served program in process, on one thread: CPU time of a batch, and memory of one more instance.

DeepFM with 26 ids and 13 numbers, 3,000,000 rows x 16 in 26 tables, three layers of 400; random weights, uniform ids.

- ebc: the trained network as it is, a torchrec EmbeddingBagCollection of 26 tables
- eager: the exported program on merged tables, torch's kernels one after another
- native: the same compiled ahead of time, weights mapped; bf16 its wide layers in bfloat16, int8 its rows as bytes

The sides take turns, round after round; figures are medians over the rounds. Memory is the growth of the proportional
set size of all processes by a second one that scores with every row of the same files. The last line is a JSON object:
`<side>_over_ebc_<rows>` and `native_over_eager_<rows>` are ratios of CPU time (below 1: faster), `bf16_over_fp32_512`
and `int8_over_fp32_512` of speed (above 1: faster), `mb_per_instance` megabytes. `bf16_over_fp32_512` is null, and a
line says so, on a CPU that does not multiply bfloat16.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median

import torch

warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deploy.native import level_of  # noqa: E402
from deploy.program import Precision, Shape, save_program, served_network  # noqa: E402
from deploy.served_program import Forward, cpu_flags, load_program  # noqa: E402
from etl.schema import DenseFeature, IdFeature, Schema, Table, TaskColumn  # noqa: E402
from recsys.experiment import Embedding  # noqa: E402
from recsys.layout import Layout  # noqa: E402
from recsys.models.deepfm import DeepFMConfig  # noqa: E402
from recsys.models.head import ModelConfig  # noqa: E402
from recsys.models.layers import init_head  # noqa: E402
from recsys.network import Network, init_rows, tables_of  # noqa: E402

IDS, NUMBERS, DIM, MAX_ROWS = 26, 13, 16, 1024
CALLS = {1: 300, 64: 60, 512: 10}
INSTANCE = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("served_program", sys.argv[1])
module = module_from_spec(spec)
spec.loader.exec_module(module)
program, rows = module.load_program(Path(sys.argv[2])), int(sys.argv[3])
with torch.inference_mode():
    for start in range(0, rows, 1024):
        ids = torch.arange(start, min(start + 1024, rows))[:, None].repeat(1, 26)
        program(ids, torch.rand(len(ids), 13))
print("ready", flush=True)
sys.stdin.read()
"""


def main() -> None:
    """Makes the network, saves it in three precisions, times the sides in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3_000_000, help="of all tables together")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="26,000 rows, one round: shows that it works, no figures")
    options = parser.parse_args()
    rows, rounds = (26_000, 1) if options.quick else (options.rows, options.rounds)
    torch.set_num_threads(1)
    network = deepfm(rows // IDS)
    with tempfile.TemporaryDirectory(prefix="serving-benchmark-") as folder, torch.inference_mode():
        sides = saved_sides(network, Path(folder))
        times = timed(sides, rows=rows // IDS, rounds=rounds)
        sizes = {name: (path / "weights.safetensors").stat().st_size for name, path in paths(Path(folder)).items()}
        bf16_on_cpu = bool({"avx512bf16", "amxbf16"} & cpu_flags())
        figures: dict[str, object] = {"level": level_of("auto"), "bf16_on_cpu": bf16_on_cpu}
        print(f"{'':8}{'MB':>8}" + "".join(f"{f'{size} rows, ms':>14}" for size in CALLS))
        for name in sides:
            megabytes = f"{sizes[name] / 1e6:8.0f}" if name in sizes else " " * 8
            print(f"{name:8}{megabytes}" + "".join(f"{times[name, size]:14.3f}" for size in CALLS))
        for size in CALLS:
            figures |= {f"{s}_over_ebc_{size}": times[s, size] / times["ebc", size] for s in sides if s != "ebc"}
            figures[f"native_over_eager_{size}"] = times["native", size] / times["eager", size]
        for name in ("bf16", "int8"):
            figures[f"{name}_over_fp32_512"] = times["native", 512] / times[name, 512]
        if not bf16_on_cpu:
            figures["bf16_over_fp32_512"] = None
            print("bf16 over fp32: skipped, this CPU has neither AVX512-BF16 nor AMX-BF16")
        figures["mb_per_instance"] = instance_mb(paths(Path(folder))["native"], rows=rows // IDS)
    print(json.dumps({name: round(x, 3) if isinstance(x, float) else x for name, x in figures.items()}))


def deepfm(rows: int) -> Network:
    """`rows` of each table."""
    names = [f"C{number}" for number in range(1, IDS + 1)]
    schema = Schema(
        features=tuple(IdFeature(name=name, type="categorical", table=name, linear_only=False) for name in names),
        dense=tuple(DenseFeature(name=f"I{number}") for number in range(1, NUMBERS + 1)),
        tables=tuple(Table(name=name, rows=rows) for name in names),
        tasks=(TaskColumn(name="click", positive_rate=0.25),),
    )
    return network_of(DeepFMConfig(hidden=[400, 400, 400]), schema)


def network_of(config: ModelConfig, schema: Schema) -> Network:
    """A network with vectors of 16 and random weights."""
    layout = Layout.of(schema, config, dim=DIM)
    head = config.build(layout.sizes)
    init_head(head, torch.Generator().manual_seed(1))
    tables = tables_of(layout, schema, device="cpu")
    network = Network(layout, tables=tables, head=head, embedding=Embedding(dim=DIM)).eval()
    for name, bag in network.tables.embedding_bags.items():
        with torch.no_grad():
            init_rows(bag.weight, table=name, first_row=0, vector=DIM, std=0.1, seed=1)
    return network


def paths(folder: Path) -> dict[str, Path]:
    """Where each precision lies."""
    return {name: folder / name for name in ("native", "bf16", "int8")}


def saved_sides(network: Network, folder: Path) -> dict[str, Forward]:
    """Every side as (ids, numbers) -> probabilities."""
    precisions = (Precision(), Precision("fp32", "bf16"), Precision("int8", "fp32"))
    native = {}
    for (name, path), precision in zip(paths(folder).items(), precisions, strict=True):
        path.mkdir()
        shape = Shape(MAX_ROWS, slots=IDS, floats=NUMBERS)
        with torch.inference_mode(False):
            save_program(served_network(network, precision), path, shape=shape, level=level_of("auto"))
        native[name] = load_program(path)
    eager = load_program(folder / "native", native=False)
    return {"ebc": lambda ids, floats: network(ids, floats).logits_BT.sigmoid(), "eager": eager, **native}


def timed(sides: dict[str, Forward], *, rows: int, rounds: int) -> dict[tuple[str, int], float]:
    """Median CPU milliseconds of one batch, by side and its rows; ids differ from call to call."""
    found: dict[tuple[str, int], list[float]] = {(name, size): [] for name in sides for size in CALLS}
    generator = torch.Generator().manual_seed(2)
    for size, calls in CALLS.items():
        batches = torch.randint(0, rows, (calls, size, IDS), generator=generator)
        numbers_BN = torch.rand(size, NUMBERS, generator=generator)
        for at in range(rounds + 1):  # the first one warms up
            for name, side in sides.items():
                milliseconds = _cpu_ms(side, batches, numbers_BN=numbers_BN)
                if at:
                    found[name, size].append(milliseconds)
    return {key: median(values) for key, values in found.items()}


def _cpu_ms(side: Forward, batches: torch.Tensor, *, numbers_BN: torch.Tensor) -> float:
    start = time.process_time()
    for ids_BS in batches:
        side(ids_BS, numbers_BN)
    return 1e3 * (time.process_time() - start) / len(batches)


def instance_mb(folder: Path, *, rows: int) -> float:
    """Megabytes that a second process adds to the first, both having read every row of the tables."""
    code = Path(__file__).resolve().parents[1] / "deploy" / "served_program.py"
    started: list[subprocess.Popen[str]] = []
    totals = []
    try:
        for _ in range(2):
            line = [sys.executable, "-W", "ignore", "-c", INSTANCE, str(code), str(folder), str(rows)]
            started.append(subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            if not (output := started[-1].stdout) or output.readline() != "ready\n":
                sys.exit("an instance did not start")
            totals.append(sum(_pss_mb(process.pid) for process in started))
    finally:
        for process in started:
            process.communicate("")
    return totals[1] - totals[0]


def _pss_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / 1e6


if __name__ == "__main__":
    main()
