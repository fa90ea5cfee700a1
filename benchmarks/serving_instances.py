"""A bundle on Triton with two instances: memory of the second, and how soon a killed process is back.

`python benchmarks/serving_instances.py BUNDLE`; benchmarks/serving.py does the same with its own bundle, and
`--vocabulary 5000000` with one that is made here, for a feature of so many values. The last line is a JSON object.
`mb_per_instance` is what ending one of the two stubs would free, after both have scored: its unique set size. It counts
no library and no mapped file, since the other stub has them too, whatever else runs on the machine; a difference of
proportional sizes would count libraries by how many other processes use them. `stub_back_s` and `server_back_s` are
seconds from a SIGKILL, while two clients send, to the eighth right answer in a row.
"""

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from deploy.bundle import MODEL
from deploy.client import Client
from deploy.repository import make_repository
from deploy.server import EmbeddedServer, ServerOptions
from etl.faults import Fault
from etl.sources import read_rows

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENT = """
name = "instances"
seed = 1
[data]
format = "parquet"
train = ["{folder}/train.parquet"]
valid = ["{folder}/test.parquet"]
test = ["{folder}/test.parquet"]
[[tasks]]
name = "click"
[[features]]
type = "categorical"
name = "item"
dtype = "int64"
[model]
kind = "deepfm"
hidden = [16]
[embedding]
dim = 4
[train]
batch_size = 100000
epochs = 1
"""


def main() -> None:
    """Serves the bundle, measures, prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--vocabulary", type=int, metavar="VALUES", help="of a bundle that is made here")
    parser.add_argument("--quick", action="store_true", help="with a vocabulary of 10,000: shows that it works")
    options = parser.parse_args()
    if options.quick:
        options.vocabulary = 10_000
    if (options.bundle is None) == (options.vocabulary is None):
        parser.error("name a BUNDLE, or the VALUES of --vocabulary")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    with tempfile.TemporaryDirectory(prefix="serving-benchmark-") as scratch:
        folder, rows = Path(scratch), None
        if options.vocabulary:
            rows = raw_rows(folder, values=options.vocabulary)
            (folder / "instances.toml").write_text(EXPERIMENT.format(folder=folder), encoding="utf-8")
            command(folder, "etl", "run", "instances.toml", "--out", "data")
            command(folder, "recsys", "train", "instances.toml", "--data", "data", "--run", "run")
            command(folder, "deploy", "export", "run", "--out", "bundle")
        print(json.dumps(two_instances(folder, options.bundle or folder / "bundle", rows=rows)))


def raw_rows(folder: Path, *, values: int) -> pa.Table:
    """Raw files in which each value occurs once to train on; returns the test rows, which hold 50,000 of them."""
    generator = np.random.default_rng(1)
    item = generator.permutation(np.arange(1, values + 1, dtype=np.int64) * 2_654_435_761)
    click = (generator.random(values) < 0.25).astype(float)
    rows = pa.table({"item": item, "click": click})
    pq.write_table(rows, folder / "train.parquet")
    pq.write_table(rows.slice(0, 50_000), folder / "test.parquet")
    return rows.slice(0, 50_000).select(["item"])


def command(folder: Path, module: str, *arguments: str) -> None:
    """One of the project's commands, in `folder`; its output is shown where it fails."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{module} {' '.join(arguments)}\n{done.stdout}{done.stderr}")


def two_instances(folder: Path, bundle: Path, *, rows: pa.Table | None = None) -> dict[str, float]:
    """Megabytes of an instance; seconds after the death of a stub, and after that of the server.

    Both instances have scored `rows` then, by default the golden ones.
    """
    place = folder / "two"
    make_repository(bundle, place / "repository", instances=2)
    options = ServerOptions(repository=place / "repository", model=MODEL, log_dir=place / "server")
    stop = threading.Event()
    with EmbeddedServer(options) as server, ThreadPoolExecutor(max_workers=3) as threads:
        endpoint = server.start()
        with Client(url := endpoint.url) as client:
            golden = read_rows(bundle / "golden" / "requests.jsonl", client.columns)
            for _ in range(4):
                client.score(golden if rows is None else rows)  # by turns, so that each instance sees most of them
        watching = threads.submit(server.supervise, stop)
        load = [threads.submit(keep_asking, url, golden, stop=stop) for _ in range(2)]
        try:
            time.sleep(2)
            stubs = psutil.Process(endpoint.pid).children()
            instance_mb = max(stub.memory_full_info().uss for stub in stubs) / 1e6
            times = [seconds_back(url, golden, kill=stubs[0].pid, folder=place / "server")]
            times.append(seconds_back(url, golden, kill=server_pid(place / "server"), folder=place / "server"))
        finally:
            stop.set()
        for each in (watching, *load):
            each.result()
    stub_s, server_s = (round(seconds, 1) for seconds in times)
    return {"mb_per_instance": round(instance_mb), "stub_back_s": stub_s, "server_back_s": server_s}


def server_pid(folder: Path) -> int:
    """The process of the server; another one is written down once all its ports answer."""
    return int(json.loads((folder / "tritonserver.json").read_text(encoding="utf-8"))["pid"])


def keep_asking(url: str, rows: pa.Table, *, stop: threading.Event) -> None:
    """One client, one request after the other."""
    with Client(url, deadline_s=2.0) as client:
        while not stop.is_set():
            with suppress(Fault):
                client.score(rows)


def seconds_back(url: str, rows: pa.Table, *, kill: int, folder: Path) -> float:
    """From the kill to the eighth of as many answers in a row by another process of the server."""
    time.sleep(1)
    earlier = server_pid(folder)
    os.kill(kill, signal.SIGKILL)
    begin, good = time.perf_counter(), 0
    while server_pid(folder) == earlier:  # the stub that is left would answer too
        time.sleep(0.05)
    while good < 8:
        good = good + 1 if answers(url, rows) else 0
        time.sleep(0.0 if good else 0.02)  # a refused connection costs nothing, and trying without rest a whole core
    return time.perf_counter() - begin


def answers(url: str, rows: pa.Table) -> bool:
    """Whether the server scores these rows within two seconds."""
    try:
        with Client(url, deadline_s=2.0) as client:
            return bool(np.isfinite(client.score(rows).score).all())
    except Fault:
        return False


if __name__ == "__main__":
    main()
