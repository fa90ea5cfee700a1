"""What the report reads of a run folder."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from etl.artifact import read_json
from etl.faults import Fault, Faults
from etl.schema import Schema, read_schema
from etl.spec import Feature, dims_of
from recsys.experiment import Embedding
from recsys.layout import Layout
from recsys.models import AnyModel
from recsys.plots import Floats, Look, Scores
from recsys.table_use import TableUse

TRAIN = "train first: `python -m recsys train EXP.toml`"
EVALUATE = "run `python -m recsys evaluate RUN`, or train first"
PREDICTIONS = "predictions/test.parquet"
FILES = {"experiment.json": TRAIN, "schema.json": TRAIN, "result.json": TRAIN, "metrics.jsonl": TRAIN} | {
    PREDICTIONS: EVALUATE
}
Record = TypeVar("Record", bound=BaseModel)
Metrics = dict[str, float | str | None]


class ExperimentFacts(BaseModel):
    """What the page says of the experiment; the rest is shown as it was written."""

    name: str
    features: list[Feature] = []
    model: AnyModel
    embedding: Embedding


class Result(BaseModel):
    """`result.json`. A metric that is null may have its reason beside it, under `<metric>_reason`; step 0 is none."""

    valid: Metrics
    test: Metrics
    steps: int
    rows: int
    seconds: float
    rows_per_second: float
    best_step: int | None = None


@dataclass(frozen=True)
class TableSize:
    """An embedding table; `width` is the floats of one row, first-order weight and padding included.

    `use`, where it was counted, says how many rows no training row looks up, and how busy the busiest are.
    """

    name: str
    rows: int
    width: int
    use: TableUse | None = None

    @property
    def megabytes(self) -> float:
        """Of the weights alone: the optimizer's state comes on top."""
        return self.rows * self.width * 4 / 1e6


@dataclass(frozen=True)
class Run:
    """A run folder, read. `series` holds (steps, values) by the name in metrics.jsonl, `scores` those of a task."""

    label: str
    experiment: ExperimentFacts
    settings: str
    schema: Schema
    result: Result
    series: dict[str, tuple[Floats, Floats]]
    scores: dict[str, Scores]
    uses: dict[str, TableUse]

    def valid_auc(self, task: str) -> tuple[Floats, Floats] | None:
        """Steps and validation AUC of a task, if any was logged."""
        return self.series.get(f"valid/{task}/auc", self.series.get("valid/auc"))

    def table_sizes(self) -> list[TableSize]:
        """The tables that the model holds, by falling size."""
        own = self.experiment
        widths = Layout.of(self.schema, own.model, dim=own.embedding.dim, dims=dims_of(own.features)).widths()
        sizes = [TableSize(n, self.schema.rows(n), width, self.uses.get(n)) for n, width in widths.items()]
        return sorted(sizes, key=lambda size: (-size.megabytes, size.name))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs, in the order given; those of one name are told apart by their folders.

    Raises:
        Fault, Faults: files are missing (all of them are named) or broken.
    """
    _require(folders)
    runs = [_read(folder) for folder in folders]
    names = [run.label for run in runs]
    return [
        replace(run, label=f"{run.label} ({folder})") if names.count(run.label) > 1 else run
        for run, folder in zip(runs, folders, strict=True)
    ]


def _require(folders: Sequence[Path]) -> None:
    if not folders:
        raise Fault("report", got="no run", wanted="one run folder or more", remedy=TRAIN)
    faults = [
        Fault(str(folder / name), got="no such file", wanted="a file of a finished run", remedy=remedy)
        for folder in folders
        for name, remedy in FILES.items()
        if not (folder / name).is_file()
    ]
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise Faults(faults)


def _read(folder: Path) -> Run:
    raw = read_json(folder / "experiment.json", remedy=TRAIN)
    experiment = _parsed(raw, place=folder / "experiment.json", into=ExperimentFacts)
    result = _parsed(read_json(folder / "result.json", remedy=TRAIN), place=folder / "result.json", into=Result)
    schema = read_schema(folder)
    return Run(
        label=experiment.name,
        experiment=experiment,
        settings=json.dumps(raw, indent=2, ensure_ascii=False),
        schema=schema,
        result=result,
        series=_read_series(folder / "metrics.jsonl"),
        scores=_read_scores(folder / PREDICTIONS, tasks=schema.task_names),
        uses=_read_uses(folder / "tables.json"),
    )


def _read_uses(path: Path) -> dict[str, TableUse]:
    """None where an older version trained."""
    raw = read_json(path, remedy=TRAIN) if path.is_file() else {}
    return {name: _parsed(use, place=path, into=TableUse) for name, use in raw.items()}


def _parsed(raw: object, *, place: Path, into: type[Record]) -> Record:
    try:
        return into.model_validate(raw)
    except ValidationError as error:
        faults = []
        for detail in error.errors(include_url=False):
            where = ".".join(str(part) for part in detail["loc"]) or "the file"
            got = "nothing" if detail["type"] == "missing" else repr(detail["input"])[:80]
            faults.append(Fault(f"{place}: {where}", got=got, wanted=detail["msg"], remedy=TRAIN))
        raise Faults(faults) from None


def _read_series(path: Path) -> dict[str, tuple[Floats, Floats]]:
    """A step logged again after a resume counts once; a last line cut off by a crash does not count."""
    by_name: dict[str, dict[int, float]] = {}
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (ValueError, KeyError, TypeError):
            wanted = "a JSON object with a step"
            raise Fault(f"{path}:{number}", got=repr(line[:80]), wanted=wanted, remedy="delete that line") from None
        for name, value in entry.items():
            if isinstance(value, int | float) and math.isfinite(value):
                by_name.setdefault(name, {})[step] = value
    return {
        name: (np.array(sorted(values), np.float64), np.array([values[step] for step in sorted(values)], np.float64))
        for name, values in by_name.items()
    }


def _read_scores(path: Path, *, tasks: Sequence[str]) -> dict[str, Scores]:
    """Rows without a label of the task (it has a condition) or without a finite score are left out."""
    wanted = [column for task in tasks for column in (task, f"{task}/label")]
    try:
        names = pq.read_schema(path).names
        if absent := [column for column in wanted if column not in names]:
            raise Fault(str(path), got=f"columns {names}", wanted=f"also {absent}", remedy=EVALUATE)
        table = pq.read_table(path, columns=wanted)
    except pa.ArrowInvalid as error:
        raise Fault(str(path), got=str(error).split("\n")[0], wanted="a parquet file", remedy=EVALUATE) from None
    scores = {}
    for task in tasks:
        values, labels = (table[name].to_numpy().astype(np.float64) for name in (task, f"{task}/label"))
        known = np.isfinite(values) & np.isfinite(labels)
        scores[task] = Scores(values[known], labels[known], Look())
    return scores
