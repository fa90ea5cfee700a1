"""Fits the Workflow, takes its state out in our order, and encodes every split with it."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from etl.artifact import Json
from etl.engines.encodings import fit_encoding
from etl.engines.fitting import Fitting
from etl.engines.nvtabular.cluster import Workers, open_workers
from etl.engines.nvtabular.coded import Coded, Parts
from etl.engines.nvtabular.library import Dataset, delayed, quiet
from etl.engines.nvtabular.plan import Plan, plan, refused
from etl.engines.nvtabular.prepare import prepare
from etl.engines.nvtabular.state import id_step, looked_step
from etl.engines.nvtabular.vocabulary import fit_table
from etl.engines.nvtabular.workflow import Graph, build
from etl.engines.polars import _described, _signature
from etl.schema import IdFeature, Table
from etl.spec import Bag, Count, Etl, FeatureSpec, Numeric, Target, resolve
from etl.transform import Transform
from etl.typed import Typed

if TYPE_CHECKING:
    from etl.engines import Encode, Fitted, Progress
    from etl.extend import Parent


@contextlib.contextmanager
def open_nvtabular(etl: Etl, *, beside: Path) -> Iterator["NVTabular"]:
    """The engine, its workers, and a folder that nobody else writes into.

    Raises:
        Fault: there is no CUDA device, or no scheduler answers.
    """
    with (
        tempfile.TemporaryDirectory(prefix=f"{beside.name}.", dir=beside.parent) as scratch,
        open_workers(etl) as workers,
    ):
        yield NVTabular(Path(scratch), workers=workers, batch_rows=etl.rows_per_group)


class NVTabular:
    """The engine. `encoder` uses the Workflow that `fit` has fitted."""

    def __init__(self, scratch: Path, *, workers: Workers, batch_rows: int) -> None:
        self._scratch, self._workers, self._batch_rows = scratch, workers, batch_rows
        self._plan, self._graph = Plan(), Graph()

    def fit(
        self, spec: FeatureSpec, train: Typed, *, transform: Path, parent: "Parent | None", progress: "Progress"
    ) -> "Fitted":
        """Fits on the training rows; writes vocabularies in the order of the polars engine.

        Raises:
            Fault: a feature that this engine does not know, or can't fit on these rows.
        """
        if parent is not None:
            raise refused("--extend", what="an extension")
        transform.mkdir()
        self._plan, signature = plan(spec), _signature(spec)
        self._graph = build(self._plan, out=self._scratch / "state")
        weighted = [looked_step(feature) for feature in resolve(spec.features) if isinstance(feature, Bag)]
        checked = Transform({"signature": signature, "features": weighted, "dense": []}, {})
        dataset, _ = self._dataset("train", train, checked=checked)
        with quiet():
            self._graph.workflow.fit(dataset)
        fitting = Fitting(transform.parent, train=train.columns, parent=None)
        tables = {table: users[0].hash_rows or 0 for table, users in spec.shared_tables().items()}
        for table, columns in self._plan.tables.items():
            found = self._graph.vocabulary(columns)
            ordered = found.with_name(f"ordered.{table}.parquet")
            users = spec.shared_tables()[table]
            tables[table] = fit_table(table, users, found=found, ordered=ordered, fitting=fitting)
            self._graph.use(columns, ordered)
        state = self._state(spec, signature=signature, tables=tables, fitting=fitting)
        progress(1.0)
        return state

    def _state(self, spec: FeatureSpec, *, signature: Json, tables: dict[str, int], fitting: Fitting) -> "Fitted":
        ids: list[Json] = []
        dense: list[Json] = []
        features: list[IdFeature] = []
        encodings = {feature.name: feature for feature in spec.encodings()}
        for feature in resolve(spec.features):
            if isinstance(feature, Target | Count):
                dense.append(fit_encoding(encodings[feature.name], spec.tasks, fitting=fitting))
                continue
            if isinstance(feature, Numeric) and feature.as_ == "dense":
                dense.append(self._graph.scale_step(self._plan.of[str(feature.name)], feature))
                continue
            step, own_rows = id_step(feature, plan=self._plan, graph=self._graph)
            ids.append(step)
            features.append(_described(feature, step))
            if own_rows:
                tables[features[-1].table] = own_rows
        sized = [Table(name=name, rows=size) for name, size in tables.items()]
        return {"version": 1, "signature": signature, "features": ids, "dense": dense}, features, sized

    def encoder(self, split: str, rows: Typed, *, transform: Transform) -> "Encode":
        """Runs the Workflow over the whole split; what it returns reads the results.

        Raises:
            Fault: a value that can't be packed, with its rows.
        """
        dataset, expected = self._dataset(split, rows, checked=transform)
        folder = self._scratch / "coded" / split
        folder.mkdir(parents=True)
        with quiet():
            frames = self._graph.workflow.transform(dataset).to_ddf().to_delayed()
        files = [folder / f"part-{at:06d}.parquet" for at in range(len(frames))]
        written = self._workers.compute(
            [delayed(_write)(frame, str(file)) for frame, file in zip(frames, files, strict=True)]
        )
        self._prepared(split).unlink()
        if sum(written) != expected:
            raise refused(f"data.{split}", what=f"{sum(written)} of {expected} rows")
        return Coded(Parts(files, written), plan=self._plan, transform=transform, split=split)

    def _dataset(self, split: str, rows: Typed, *, checked: Transform) -> tuple[Any, int]:
        """A split for NVTabular, a partition a row group, and its rows."""
        prepared = self._prepared(split)
        if not prepared.is_file():
            prepared.parent.mkdir(exist_ok=True)
            prepare(rows, prepared, plan=self._plan, checked=checked, batch_rows=self._batch_rows)
        with quiet():
            dataset = Dataset(str(prepared), engine="parquet", cpu=not self._workers.cuda, row_groups_per_part=1)
        return dataset, pq.ParquetFile(prepared).metadata.num_rows

    def _prepared(self, split: str) -> Path:
        return self._scratch / "prepared" / f"{split}.parquet"


def _write(frame: Any, path: str) -> int:
    """Writes a part on the worker and returns its rows."""
    on_gpu = hasattr(frame, "to_arrow")
    table = frame.to_arrow(preserve_index=False) if on_gpu else pa.Table.from_pandas(frame, preserve_index=False)
    pq.write_table(table, path)
    return int(table.num_rows)
