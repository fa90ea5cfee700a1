"""A trained run -> a bundle, refused where the served program does not score as the trained network does."""

import importlib.metadata
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

import etl.transform
from deploy import exporter, monitor, ranker, ranking, served_program, triton_model_file
from deploy.bundle import MARKER, Bundle, ServeDefaults, Signature, file_hashes
from deploy.offline import Scores, offline_scores
from deploy.program import Lookup, ServedNetwork, save_program
from deploy.reference import write_reference
from etl.artifact import new_folder, read_json, write_json
from etl.faults import Fault
from etl.pack import pack
from etl.schema import Schema
from etl.sources import arrow_type, read_raw_split
from etl.spec import expanded
from etl.transform import Transform
from recsys.experiment import Experiment
from recsys.network import Network
from recsys.predict import load_network

_EDGES: dict[str, list[Any]] = {
    "string": [None, "", "a text that no training row holds", "日本語"],
    "int64": [None, 0, 2**63 - 1, -(2**63) + 2],
    "float64": [None, 0.0, 1e6, -1e6],
    "list<string>": [None, [], ["a text that no training row holds"], [None]],
    "list<int64>": [None, [], [2**63 - 1], [None]],
    "list<float64>": [None, [], [2.0], [0.0]],
}


def export(run: Path, out: Path) -> Bundle:
    """Writes the bundle folder at once and returns what its manifest says.

    Raises:
        Fault: the run has no result, its raw test files are gone, or a golden row's score differs by more than the
            tolerance in `[export]`.
    """
    result = read_json(run / "result.json", remedy="finish the training: python -m recsys train EXP.toml")
    experiment, schema, network = load_network(run)
    transform = Transform.load(run / "transform")
    with new_folder(out, marker=MARKER) as folder:
        _copy_parts(run, folder)
        write_reference(run, folder, schema=schema)
        served = served_network(network)
        max_rows = experiment.serve.max_batch_size
        sizes = {"slots": len(schema.slot_names), "floats": len(schema.float_names)}
        save_program(served, folder, max_rows=max_rows, **sizes)
        rows = golden_rows(experiment, transform)
        offline = offline_scores(network, transform, table=rows)
        _write_golden(folder / "golden", rows, offline=offline, tasks=schema.task_names)
        _check(folder, transform, rows=rows, offline=offline, tolerance=experiment.export.tolerance, max_rows=max_rows)
        bundle = _manifest(
            run, experiment, schema=schema, transform=transform, result=result, files=file_hashes(folder)
        )
        write_json(folder / MARKER, bundle.model_dump(mode="json"))
    return bundle


def served_network(network: Network) -> ServedNetwork:
    """The trained head on merged tables: rows with a vector in one matrix, first-order weights alone in another."""
    layout = network.layout
    tables: dict[str, Tensor] = {
        config.name: network.tables.embedding_bags[config.name].weight.detach()
        for config in network.tables.embedding_bag_configs()
    }
    names = [table for _, table in layout.slots]
    full, alone = names[: layout.vectors], names[layout.vectors :]
    used = layout.sizes.dim + (1 if layout.linear else 0)  # the rest is padding
    rows, weights = {name: tables[name][:, :used] for name in full}, {name: tables[name][:, :1] for name in alone}
    return ServedNetwork(
        network.head,
        layout,
        rows=Lookup(layout.columns[: layout.vectors], names=full, tables=rows) if full else None,
        weights=Lookup(layout.columns[layout.vectors :], names=alone, tables=weights) if alone else None,
    )


def golden_rows(experiment: Experiment, transform: Transform) -> pa.Table:
    """The first raw test rows, and rows of missing, unseen and extreme values."""
    test = read_raw_split(experiment, "test").slice(0, experiment.export.golden_rows)
    columns = transform.signature.columns
    edges = {name: pa.array(_EDGES[dtype], arrow_type(dtype)) for name, dtype in columns.items()}
    return pa.concat_tables([test, pa.table(edges).cast(test.schema)]).combine_chunks()


def _copy_parts(run: Path, folder: Path) -> None:
    for name in ("schema.json", "experiment.json"):
        shutil.copyfile(run / name, folder / name)
    shutil.copytree(run / "transform", folder / "transform")
    for module in (etl.transform, ranker, ranking, monitor, exporter, served_program):
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


def _check(
    folder: Path, transform: Transform, *, rows: pa.Table, offline: Scores, tolerance: float, max_rows: int
) -> None:
    """Scores the golden rows with the files that were just written."""
    packed = pack(rows, transform.signature)
    served = ranker.Ranker(folder, etl.transform, program=served_program.load_program(folder))
    for at in range(0, len(packed.keys), max_rows):
        part = slice(at, at + max_rows)
        scored = served.score([ranker.Request(packed.keys[part], packed.numbers[part])])[0]
        if isinstance(scored, ValueError):
            remedy = "report it with the experiment file"
            raise Fault(str(folder), got=str(scored), wanted="scores of the golden rows", remedy=remedy)
        difference = float(np.abs(scored.score - offline.score[part]).max())
        if difference > tolerance or not np.array_equal(scored.ids, offline.ids[part]):
            got, wanted = f"scores that differ by {difference:.2e}", f"at most {tolerance:g}, and equal ids"
            raise Fault(
                f"{folder.name}: program.pt2", got=got, wanted=wanted, remedy="raise export.tolerance knowingly"
            )


def _manifest(
    run: Path,
    experiment: Experiment,
    *,
    schema: Schema,
    transform: Transform,
    result: dict[str, Any],
    files: dict[str, str],
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
        signature=Signature.model_validate_json(json.dumps(transform.signature.as_json())),
        tolerance=experiment.export.tolerance,
        serve=ServeDefaults.model_validate(
            experiment.serve.model_dump() | {"user": tuple(expanded(experiment.serve.user))}
        ),
        versions=packages | {"python": platform.python_version()},
        files=files,
    )


def _figures(metrics: dict[str, Any]) -> dict[str, float | None]:
    return {name: value for name, value in metrics.items() if value is None or isinstance(value, float)}
