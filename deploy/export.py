"""A trained run -> a bundle, refused where the served program does not score as the trained network does."""

import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import etl.lookup
import etl.transform
from deploy import exporter, monitor, ranker, ranking, served_program, triton_model_file
from deploy.bundle import MARKER, Bundle, Cost, ServeDefaults, Signature, file_hashes
from deploy.lookup import Columns, Split
from deploy.native import level_of
from deploy.offline import Scores, offline_scores
from deploy.precision import accepted, costs
from deploy.program import Precision, Shape, save_program, served_network
from deploy.reference import write_reference
from deploy.wire import narrow
from etl.artifact import new_folder, read_json, write_json
from etl.experiment_file import parse
from etl.faults import Fault
from etl.pack import pack, part
from etl.schema import Schema
from etl.sources import arrow_type, read_raw_split
from etl.spec import expanded
from etl.transform import Packed, Transform
from recsys.data import open_dataset
from recsys.experiment import Experiment, Export
from recsys.network import Network
from recsys.predict import load_network

_TOLERANCE, _LOWER_TOLERANCE = 1e-6, 1e-3
_EDGES: dict[str, list[Any]] = {
    "string": [None, "", "a text that no training row holds", "日本語"],
    "int64": [None, 0, 2**63 - 1, -(2**63) + 2],
    "float64": [None, 0.0, 1e6, -1e6],
    "list<string>": [None, [], ["a text that no training row holds"], [None]],
    "list<int64>": [None, [], [2**63 - 1], [None]],
    "list<float64>": [None, [], [2.0], [0.0]],
}


def export(
    run: Path,
    out: Path,
    *,
    data: Path | None = None,
    overrides: Mapping[str, str | float] | None = None,
    tell: Callable[[Sequence[Cost]], None] | None = None,
) -> Bundle:
    """Writes the bundle folder at once and returns what its manifest says.

    `data` is the dataset folder, by default beside the run: without one there are no costs, and no drift of values.
    `overrides` are settings that replace those of `[export]`. `tell` gets the costs before one of them may be refused.

    Raises:
        Fault: the run has no result, its raw test files are gone or hold numbers that the client would not send, the
            dataset folder is another experiment's, a golden row's score differs by more than the tolerance in
            `[export]`, or a lower precision moves AUC or NE of the validation rows beyond the budget.
        Faults: overrides that are no settings.
    """
    result = read_json(run / "result.json", remedy="finish the training: python -m recsys train EXP.toml")
    experiment, schema, network = load_network(run)
    settings = parse(experiment.export.model_dump() | dict(overrides or {}), place="[export]", into=Export)
    experiment = experiment.model_copy(update={"export": settings})
    wanted, level = Precision(settings.tables, settings.dense), level_of(settings.compile)
    dataset = data or run.parent / "data"
    lower = settings.tolerance or _LOWER_TOLERANCE
    found = _costs(network, schema, experiment=experiment, dataset=dataset, tolerance=lower)
    if tell:
        tell(found)
    precision = accepted(found, wanted, budget=settings)
    transform = Transform.load(run / "transform")
    rows = golden_rows(experiment, transform)
    packed = _packed(rows, transform.signature, numbers=experiment.serve.numbers)
    with new_folder(out, marker=MARKER) as folder:
        _copy_parts(run, folder)
        write_reference(run, folder, schema=schema, dataset=dataset)
        shape = Shape(experiment.serve.max_batch_size, slots=len(schema.slot_names), floats=len(schema.float_names))
        split = _split(schema, transform, user=expanded(experiment.serve.user))
        save_program(served_network(network, precision, split=split), folder, shape=shape, level=level)
        offline = offline_scores(network, transform, table=rows)
        _write_golden(folder / "golden", rows, offline=offline, tasks=schema.task_names)
        tolerance = lower if settings.tolerance or wanted != Precision() else _TOLERANCE
        check = _Golden(packed, offline, tolerance)
        for native in (False, True) if level else (False,):
            _check(folder, check, serve=_serve_defaults(experiment), native=native)
        about = _About(precision, level, tolerance, found)
        bundle = _manifest(run, experiment, schema=schema, transform=transform, result=result, about=about)
        bundle = bundle.model_copy(update={"files": file_hashes(folder)})
        write_json(folder / MARKER, bundle.model_dump(mode="json"))
    return bundle


def _costs(
    network: Network, schema: Schema, *, experiment: Experiment, dataset: Path, tolerance: float
) -> tuple[Cost, ...]:
    valid = dataset / "valid"
    if valid.is_dir():
        open_dataset(dataset, experiment.data_hash())
    return costs(network, schema, valid=valid, limit_rows=experiment.export.cost_rows, tolerance=tolerance)


def golden_rows(experiment: Experiment, transform: Transform) -> pa.Table:
    """The first raw test rows, and rows of missing, unseen and extreme values."""
    test = read_raw_split(experiment, "test").slice(0, experiment.export.golden_rows)
    columns = transform.signature.columns
    edges = {name: pa.array(_EDGES[dtype], arrow_type(dtype)) for name, dtype in columns.items()}
    return pa.concat_tables([test, pa.table(edges).cast(test.schema)]).combine_chunks()


def _packed(rows: pa.Table, signature: etl.transform.Signature, *, numbers: str) -> Packed:
    """The rows as they travel. Raises Fault where the client would refuse them as numbers of 32 bits."""
    packed = pack(rows, signature)
    if numbers == "fp32":
        try:
            narrow(packed.numbers, signature)
        except ValueError as error:
            wanted, remedy = "test rows that float32 holds exactly", 'set it to "fp64", or round the raw column'
            raise Fault('serve.numbers = "fp32"', got=str(error), wanted=wanted, remedy=remedy) from None
    return packed


def _copy_parts(run: Path, folder: Path) -> None:
    for name in ("schema.json", "experiment.json"):
        shutil.copyfile(run / name, folder / name)
    shutil.copytree(run / "transform", folder / "transform")
    etl.lookup.write_slots(folder / "transform")
    for module in (etl.lookup, etl.transform, ranker, ranking, monitor, exporter, served_program):
        path = Path(str(module.__file__))
        shutil.copyfile(path, folder / path.name)
    shutil.copyfile(triton_model_file(), folder / "model.py")


def _write_golden(folder: Path, rows: pa.Table, *, offline: Scores, tasks: list[str]) -> None:
    folder.mkdir()
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows.to_pylist())
    (folder / "requests.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    columns = {task: pa.array(offline.score[:, at]) for at, task in enumerate(tasks)}
    columns["ids"] = pa.array(list(offline.ids), pa.list_(pa.int64()))
    pq.write_table(pa.table(columns), folder / "scores.parquet")


class _Golden(NamedTuple):
    """Packed golden rows, what they score offline, and how much that may differ."""

    packed: Packed
    offline: Scores
    tolerance: float


def _check(folder: Path, golden: _Golden, *, serve: ServeDefaults, native: bool) -> None:
    """Scores the golden rows with the files that were just written, also as users with one candidate each."""
    packed, size = golden.packed, serve.max_batch_size
    served = ranker.Ranker(folder, etl.transform, program=served_program.load_program(folder, native=native))
    for rows in (slice(at, at + size) for at in range(0, len(packed.keys), size)):
        results = served.score([ranker.Request(packed.keys[rows], packed.numbers[rows])])
        _compare(results, golden, rows=rows, folder=folder)
    if serve.user:
        _compare(_ranked(served, packed, serve=serve), golden, rows=slice(None), folder=folder)


def _ranked(served: ranker.Ranker, packed: Packed, *, serve: ServeDefaults) -> list[Any]:
    """Each row as a ranking request."""
    signature = served.encoder.transform.signature
    names = {"user": set(serve.user), "items": set(signature.columns) - set(serve.user)}
    described = {side: _described(signature).part(some).model_dump(mode="json") for side, some in names.items()}
    ranks = ranking.Ranking(served, ranker, **described, most=1, rows=serve.max_batch_size)
    halves = [part(packed, signature, names=some) for some in names.values()]
    rows = [[ranker.Request(half.keys[[at]], half.numbers[[at]]) for half in halves] for at in range(len(packed.keys))]
    return ranks.score([ranking.RankRequest(*row) for row in rows])


def _compare(results: Sequence[Any], golden: _Golden, *, rows: slice, folder: Path) -> None:
    if fault := next((result for result in results if isinstance(result, ValueError)), None):
        remedy = "report it with the experiment file"
        raise Fault(str(folder), got=str(fault), wanted="scores of the golden rows", remedy=remedy)
    score, ids = (np.concatenate([getattr(result, name) for result in results]) for name in ("score", "ids"))
    difference = float(np.abs(score - golden.offline.score[rows]).max())
    if difference > golden.tolerance or not np.array_equal(ids, golden.offline.ids[rows]):
        got, wanted = f"scores that differ by {difference:.2e}", f"at most {golden.tolerance:g}, and equal ids"
        place, remedy = f"{folder.name}: the program", "export a higher precision, or raise export.tolerance"
        raise Fault(place, got=got, wanted=wanted, remedy=f"{remedy} knowingly")


class _About(NamedTuple):
    precision: Precision
    level: str | None
    tolerance: float
    costs: tuple[Cost, ...]


def _manifest(
    run: Path,
    experiment: Experiment,
    *,
    schema: Schema,
    transform: Transform,
    result: dict[str, Any],
    about: _About,
) -> Bundle:
    packages = {name: importlib.metadata.version(name) for name in ("rankforge", "torch", "numpy")}
    return Bundle(
        name=experiment.name,
        run=str(run.resolve()),
        step=result["best_step"],
        metrics={split: _figures(result[split]) for split in ("valid", "test")},
        tasks=tuple(schema.task_names),
        ids=tuple(schema.slot_names),
        floats=tuple(schema.float_names),
        signature=_described(transform.signature),
        tolerance=about.tolerance,
        serve=_serve_defaults(experiment),
        versions=packages | {"python": platform.python_version()},
        quantization="none" if about.precision == Precision() else str(about.precision),
        isa=about.level or "any: no native code",
        costs=about.costs,
        files={},
    )


def _serve_defaults(experiment: Experiment) -> ServeDefaults:
    user = tuple(expanded(experiment.serve.user))
    return ServeDefaults.model_validate(experiment.serve.model_dump() | {"user": user})


def _described(signature: etl.transform.Signature) -> Signature:
    return Signature.model_validate_json(json.dumps(signature.as_json()))


def _split(schema: Schema, transform: Transform, *, user: Collection[str]) -> Split | None:
    """The columns of ids and floats that these raw columns alone decide; None without any raw column."""
    if not user:
        return None
    described = schema.model_dump(mode="json")
    users = ranking.users_features(transform, user)
    sides = ranking.sides(described["features"], dense=described["dense"], users=users)
    return Split(*(Columns(ids.tolist(), floats.tolist()) for ids, floats in sides))


def _figures(metrics: dict[str, Any]) -> dict[str, float | None]:
    return {name: value for name, value in metrics.items() if value is None or isinstance(value, float)}
