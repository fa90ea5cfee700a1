"""The ETL job: stage typed raw rows, fit on the training rows alone, encode every split, write the folder at once."""

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from polars.exceptions import PolarsError

from etl.artifact import Json, lost_files, new_folder, read_json, write_json
from etl.engines import Encode, Engine, Fitted, open_engine
from etl.engines.compiled import CompiledVocabulary
from etl.engines.native import load
from etl.engines.scaling import FastTransform
from etl.extend import Parent, extends, record, training
from etl.faults import Fault
from etl.folds import OutOfFold
from etl.formats import files
from etl.nulls import DenseNulls
from etl.reader import Part
from etl.schema import GROUP, WEIGHT, DenseFeature, Schema, TaskColumn
from etl.shards import Finished, Shards
from etl.spec import FeatureSpec, Task
from etl.splits import SPLITS
from etl.stage import stage
from etl.threads import ahead, in_order
from etl.transform import Encoded, Int64s, Transform
from etl.typed import Report, Typed, typed_files


def run(spec: FeatureSpec, out: Path, *, report: Report, parent: Parent | None = None) -> Json:
    """Makes the dataset folder and returns its manifest; `report` hears of (stage, rows so far).

    With a parent the tables and counts continue the parent's.

    Raises:
        Fault: whatever is wrong with the raw files or a column; an old folder stays as it was.
    """
    with (
        new_folder(out, marker="manifest.json") as folder,
        open_engine(spec.etl, beside=folder) as engine,
        Finished() as finished,
    ):
        Thread(target=load).start()  # while labels are read
        raw_files, seen = _raw_files(spec), finished.beside(partial(training, spec))
        (raw := folder / "raw").mkdir()
        typed = typed_files(spec, report=report) or stage(spec, raw, report=report, dataset=folder)
        fitted = _fit(spec, typed["train"], engine=engine, folder=folder, parent=parent, report=report)
        state, features, tables = fitted
        write_json(folder / "transform" / "transform.json", state)
        schema = Schema(
            features=tuple(features),
            dense=tuple(DenseFeature(name=step["name"]) for step in state["dense"]),
            tables=tuple(tables),
            tasks=tuple(_task(task, rate=typed["train"].labels.rates[task.name]) for task in spec.tasks),
            group=spec.data.group is not None,
            weight=spec.data.weight is not None,
        )
        schema.write(folder)
        finished.add(*(path for path in (folder / "transform").rglob("*") if path.is_file()))
        transform, stats = _transform(folder / "transform"), {}
        encoders = {split: engine.encoder(split, rows, transform=transform) for split, rows in typed.items()}
        encoded = _encoded(spec, _parts(typed, encoders), schema=schema, folder=folder)
        for split, rows in groupby(encoded, key=attrgetter("split")):
            shards = Shards(folder / split, spec.etl, finished=finished)
            stats[split] = _write(rows, typed[split], schema=schema, shards=shards, report=report)
        shutil.rmtree(raw)
        _refuse_changed(raw_files, spec)
        manifest = {"hash": spec.data_hash(), "engine": spec.etl.engine, "raw": raw_files, "splits": stats}
        manifest |= record(spec, parent, tables=tables, own=seen.result())
        manifest["files"] = finished.files(folder)
        write_json(folder / "manifest.json", manifest)
    return manifest


def _fit(
    spec: FeatureSpec, train: Typed, *, engine: Engine, folder: Path, parent: Parent | None, report: Report
) -> Fitted:
    """Fits the transform. Of rows that can't be fitted, a fault of the rows themselves comes first."""
    rows = train.labels.rows

    def progress(share: float) -> None:
        report("fit train", round(share * rows), total=rows)

    progress(0.0)
    try:
        return engine.fit(spec, train, transform=folder / "transform", parent=parent, progress=progress)
    except (Fault, PolarsError, pa.ArrowException, OSError):
        for _ in train.batches():
            pass
        raise


def _transform(folder: Path) -> Transform:
    """What was fitted, with its tables compiled and read several at once."""
    paths = sorted(folder.glob("vocabulary/*.parquet"))
    tables = dict(zip(paths, in_order(CompiledVocabulary.read, paths), strict=True))
    return FastTransform.load(folder, vocabulary=tables.__getitem__)


def _task(task: Task, *, rate: float) -> TaskColumn:
    return TaskColumn(name=task.name, positive_rate=rate, weight=task.weight, given=task.given)


def up_to_date(spec: FeatureSpec, out: Path, *, parent: Parent | None = None) -> bool:
    """Whether the folder is whole, made from these sections, from the raw files as they are now and this parent."""
    manifest = out / "manifest.json"
    if not manifest.is_file():
        return False
    made = read_json(manifest, remedy="delete the folder and run the ETL again")
    same = made["hash"] == spec.data_hash() and made["raw"] == _raw_files(spec)
    return bool(same and extends(made, parent, folder=out) and not lost_files(out, made["files"]))


def _raw_files(spec: FeatureSpec) -> dict[str, list[int]]:
    """Raw file -> bytes and time of change, to notice new data."""
    paths = [path for split in SPLITS for path in files(getattr(spec.data, split), what=split)]
    return {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


def _refuse_changed(before: dict[str, list[int]], spec: FeatureSpec) -> None:
    """Raises Fault where a raw file is not the one that the job began with."""
    now = _raw_files(spec)
    if changed := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
        wanted, remedy = "files that stay as they are meanwhile", "run the command again once they are written"
        raise Fault(changed[0], got="a file that changed while it was read", wanted=wanted, remedy=remedy)


def encoded_columns(encoded: Encoded, schema: Schema) -> dict[str, pa.Array]:
    """The columns of a shard: ids (lists where a feature has several slots), values of weighted ids, dense inputs."""
    columns: dict[str, pa.Array] = {}
    values_at = len(schema.dense)
    for feature, end in zip(schema.features, schema.slot_ends, strict=True):
        ids = encoded.ids[:, end - feature.slots : end]
        columns[feature.name] = _column(ids, ids, dtype=feature.dtype)
        if feature.weighted:
            values = encoded.floats[:, values_at : values_at + feature.slots]
            columns[f"{feature.name}:value"] = _column(values, ids, dtype=feature.dtype)
            values_at += feature.slots
    return columns | {dense.name: pa.array(encoded.floats[:, at]) for at, dense in enumerate(schema.dense)}


def _column(matrix: npt.NDArray[Any], ids: Int64s, *, dtype: str) -> pa.Array:
    """Single values; or, where slots hold an id, lists of what the matrix holds."""
    if dtype == "int64":
        return pa.array(matrix[:, 0])
    filled = ids >= 0
    offsets = np.concatenate([[0], np.cumsum(filled.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(matrix[filled]))


class _Part(NamedTuple):
    """Rows of a split that follow one another, from `first` on, and what encodes them."""

    split: str
    first: int
    rows: Part
    encode: Encode


class _Encoded(NamedTuple):
    """The columns of a shard, what is counted by feature, and the nulls of dense features."""

    split: str
    table: pa.Table
    missing: Int64s
    unseen: Int64s
    nulls: Json


def _parts(typed: Mapping[str, Typed], encoders: Mapping[str, Encode]) -> Iterator[_Part]:
    """The rows of all splits, one after the other."""
    for split, rows in typed.items():
        first = 0
        for part in rows.parts():
            yield _Part(split, first, part, encoders[split])
            first += part.rows


def _encoded(spec: FeatureSpec, parts: Iterable[_Part], *, schema: Schema, folder: Path) -> Iterator[_Encoded]:
    """Each part encoded, in order: reading, encoding and what is done with the result run beside one another."""
    raw_columns, out_of_fold, nulls = list(spec.raw_columns()), OutOfFold.load(folder), DenseNulls(spec)
    beside = {GROUP: spec.data.group, WEIGHT: spec.data.weight}

    def encoded(part: _Part) -> _Encoded:
        batch = part.rows.typed()
        raw = pa.Table.from_batches([batch]).select(raw_columns)
        found = part.encode(raw, part.first)
        columns = encoded_columns(found, schema)
        columns |= out_of_fold.columns(raw, first_row=part.first) if part.split == "train" else {}
        columns |= {task.name: batch[f"label:{task.name}"] for task in spec.tasks}
        columns |= {name: batch[name] for name, given in beside.items() if given}
        whole = pa.schema([pa.field(name, column.type, nullable=False) for name, column in columns.items()])
        return _Encoded(part.split, pa.table(columns, schema=whole), found.missing, found.unseen, nulls.of(batch))

    return in_order(encoded, ahead(parts), beside=1)


def _write(encoded: Iterable[_Encoded], split: Typed, *, schema: Schema, shards: Shards, report: Report) -> Json:
    """Writes one split's shards in row order; counts rows, missing and unseen values by feature."""
    stage, names = f"encode {shards.folder.name}", [feature.name for feature in schema.features]
    missing, unseen = np.zeros((2, len(names)), np.int64)
    nulls: Counter[str] = Counter()
    report(stage, 0, total=split.labels.rows)
    for part in encoded:
        nulls.update(part.nulls)
        missing += part.missing
        unseen += part.unseen
        shards.write(part.table)
        report(stage, shards.rows, total=split.labels.rows)
    shards.close()
    counts = zip(names, missing.tolist(), unseen.tolist(), strict=True)
    return {
        "rows": shards.rows,
        "features": {name: {"missing": m, "unseen": u} for name, m, u in counts},
        "dense": {name: {"missing": rows} for name, rows in nulls.items()},
        "label_rate": split.labels.rates,
        "label_parts": split.labels.parts,
        "files": split.files,
    }
