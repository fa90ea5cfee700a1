"""A bundle under load in a server of its own, beside an empty model and beside the trained network in this process."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.utils import InferenceServerException

from deploy.bench import Load, Measured, load_server, ranking_requests_of, requests_of, run_in_process
from deploy.bundle import MODEL, Bundle, read_bundle
from deploy.connect import connect
from deploy.offline import offline_run
from deploy.ranker import Request
from deploy.repository import config_text, make_repository
from deploy.server import EmbeddedServer, Endpoint, ServerOptions
from deploy.wire import as_float32
from etl.artifact import Json, write_json, write_text
from etl.faults import Fault
from etl.pack import pack, part
from etl.sources import read_raw_split
from etl.transform import Packed, Signature
from recsys.experiment import read_experiment
from recsys.predict import probabilities

ECHO = "echo"
_ROUNDS = 2
_TIMEOUT_S = 10.0
_ROWS = 4096  # of the raw test split that are sent, over and over
_ECHO_MODEL = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        given = [{tensor.name(): tensor.as_numpy() for tensor in request.inputs()} for request in requests]
        return [pb_utils.InferenceResponse([self._zeros(arrays)]) for arrays in given]

    def _zeros(self, arrays):
        items = [array for name, array in arrays.items() if name.startswith("item_")]
        if items:
            return pb_utils.Tensor("rank_score", np.zeros((*items[0].shape[:2], TASKS), np.float32))
        return pb_utils.Tensor("score", np.zeros((len(next(iter(arrays.values()))), TASKS), np.float32))
"""


def bench_bundle(bundle_dir: Path, *, rows: int, load: Load, ranked: bool = False) -> list[Measured]:
    """The sides in turns, each the better of two rounds: served, echo, and eager in process, one thread each. `ranked`:
    the rows of a request are one user's candidates; in process they are written out.

    Raises Fault, Faults: no sound bundle, or the run or the raw rows that it was made from are gone; it does not rank.
    """
    bundle = read_bundle(bundle_dir)
    if ranked and not bundle.serve.user:
        raise _rows_alone(str(bundle_dir))
    packed = packed_rows(bundle_dir, bundle)
    sent = _halves(packed, bundle) if ranked else (packed,)
    requests = {model: _requests(sent, model, rows=rows, numbers=bundle.serve.numbers) for model in (MODEL, ECHO)}
    torch.set_num_threads(1)
    eager = _Eager(Path(bundle.run), packed, rows=rows)
    with _serving(bundle_dir, bundle) as endpoint:
        sides: dict[str, list[Measured]] = {"served": [], "echo": [], "eager in process": []}
        for _ in range(_ROUNDS):
            for side, model in (("served", MODEL), ("echo", ECHO)):
                found = load_server(endpoint.url, requests[model], rows=rows, load=load, side=side, pid=endpoint.pid)
                sides[side].append(found)
            sides["eager in process"].append(
                run_in_process(eager, rows=rows, seconds=load.seconds, side="eager in process")
            )
    return [max(found, key=lambda each: each.rows_per_s) for found in sides.values()]


def bench_server(url: str, *, rows: int, load: Load, ranked: bool = False) -> list[Measured]:
    """A server that runs, with random rows: it knows few of their ids. Raises Fault where none answers, or ranks."""
    described = _described(url, load.tls)
    generator = np.random.default_rng(1)
    if ranked:
        if "ranking" not in described:
            raise _rows_alone(url)
        sent = tuple(_random(described["ranking"][part], generator) for part in ("user", "items"))
    else:
        sent = (_random(described, generator),)
    requests = _requests(sent, MODEL, rows=rows, numbers=str(described.get("numbers_type", "FP64")).lower())
    return [load_server(url, requests, rows=rows, load=load, side="served", pid=None)]


def _random(described: Mapping[str, Json], generator: np.random.Generator) -> Packed:
    signature = Signature.from_json(described)
    keys = generator.integers(1, 2**62, (_ROWS, len(signature.packed_names(signature.keys))))
    return Packed(keys, generator.exponential(1.0, (_ROWS, len(signature.packed_names(signature.numbers)))))


def _requests(sent: Sequence[Packed], model: str, *, rows: int, numbers: str) -> list[bytes]:
    """Of rows, or of users and of candidates, with numbers of the type that the model takes."""
    parts = [Request(each.keys, as_float32(each.numbers) if numbers == "fp32" else each.numbers) for each in sent]
    if len(parts) == 1:
        return requests_of(parts[0], model, rows=rows)
    return ranking_requests_of(*parts, model=model, candidates=rows)


def _halves(packed: Packed, bundle: Bundle) -> tuple[Packed, Packed]:
    """The users' columns of packed rows, and the candidates'."""
    signature, user = Signature.from_json(bundle.signature.model_dump()), set(bundle.serve.user)
    return part(packed, signature, names=user), part(packed, signature, names=set(signature.columns) - user)


def _rows_alone(place: str) -> Fault:
    remedy = "name the user's columns in [serve] user and export again, or send rows"
    return Fault(place, got="a model of rows alone", wanted="one that ranks", remedy=remedy)


def packed_rows(bundle_dir: Path, bundle: Bundle) -> Packed:
    """The first raw test rows as they travel."""
    raw = read_raw_split(read_experiment(bundle_dir), "test").slice(0, _ROWS)
    return pack(raw.select(list(bundle.signature.columns)), Signature.from_json(bundle.signature.model_dump()))


def _described(url: str, tls: Path | None) -> Mapping[str, Json]:
    """The served signature."""
    try:
        with connect(url, tls=tls) as client:
            config = client.get_model_config(MODEL, client_timeout=_TIMEOUT_S).config
        described: Mapping[str, Json] = json.loads(config.parameters["signature"].string_value)
    except (InferenceServerException, ValueError) as error:
        remedy = "give the gRPC address of a 'deploy serve'"
        raise Fault(url, got=str(error), wanted="a server that serves a bundle", remedy=remedy) from None
    return described


def write_results(folder: Path, results: list[Measured], *, about: Mapping[str, int], load: Load) -> None:
    """bench.json, and bench.svg with the distribution of the latencies."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    plain = [{name: value for name, value in asdict(each).items() if name != "latencies_ms"} for each in results]
    told = {"clients": load.clients, "rate": load.rate, "seconds": load.seconds}
    write_json(folder / "bench.json", {**about, "load": told, "sides": plain})
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for each in results:
        ordered = np.sort(each.latencies_ms)
        axes.plot(ordered, np.linspace(0, 100, len(ordered)), label=each.side)
    axes.set(xlabel="latency, ms", ylabel="requests answered, %", xscale="log", ylim=(0, 100))
    axes.legend()
    figure.savefig(folder / "bench.svg")


class _Eager:
    """The transform and the trained network, as `recsys predict` has them, on packed rows."""

    def __init__(self, run: Path, packed: Packed, *, rows: int) -> None:
        self._network, self._transform = offline_run(run)
        take = np.arange(max(rows, len(packed.keys))) % len(packed.keys)
        self._packed, self._rows = Packed(packed.keys[take], packed.numbers[take]), rows

    def __call__(self, at: int) -> None:
        start = at * self._rows % (len(self._packed.keys) - self._rows + 1)
        part = slice(start, start + self._rows)
        encoded = self._transform.apply(Packed(self._packed.keys[part], self._packed.numbers[part]))
        probabilities(self._network, encoded)


@contextmanager
def _serving(bundle_dir: Path, bundle: Bundle) -> Iterator[Endpoint]:
    with tempfile.TemporaryDirectory(prefix="rankforge-bench-") as scratch:
        repository = Path(scratch, "repository")
        make_repository(bundle_dir, repository)
        add_echo(repository, tasks=len(bundle.tasks))
        options = ServerOptions(repository=repository, model=MODEL, others=(ECHO,), log_dir=Path(scratch, "server"))
        with EmbeddedServer(options) as server:
            yield server.start()


def add_echo(repository: Path, *, tasks: int) -> None:
    """A model of the same inputs that computes nothing: what Triton itself costs."""
    config = text_format.Parse((repository / MODEL / "config.pbtxt").read_text(encoding="utf-8"), pb.ModelConfig())
    config.name = ECHO
    config.version_policy.specific.versions[:] = [1]
    scores = [output for output in config.output if output.name.endswith("score")]
    del config.output[:]
    config.output.extend(scores)
    config.ClearField("parameters")
    (repository / ECHO / "1").mkdir(parents=True)
    write_text(repository / ECHO / "config.pbtxt", config_text(config))
    write_text(repository / ECHO / "1" / "model.py", _ECHO_MODEL.replace("TASKS", str(tasks)))
