"""Starts a run from another one: incremental training on new rows, a new head on old tables, an FNN on an FM's.

Rows are known by their number, so the tables have to be the same ones, or `etl run --extend` of them: their first rows
mean what they meant. Rows that were added, and whatever the other run has not in the same shape, start as usual.
"""

import json
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from etl.artifact import read_json, write_json
from etl.faults import Fault, Faults
from etl.schema import Schema, read_schema
from recsys.checkpoint import best, latest, read_progress, refuse_damaged
from recsys.experiment import Experiment, read_experiment
from recsys.layout import Layout
from recsys.learner import Learner
from recsys.network import layout_of
from recsys.parallel.state import restore_parts, sizes_here, sizes_of
from recsys.parallel.world import barrier

_LOG = logging.getLogger(__name__)
_HEAD, _TABLES = "model.head.", "model.tables.embedding_bags."


@dataclass(frozen=True)
class Source:
    """The run that another one starts from, and its best checkpoint."""

    run: Path
    checkpoint: Path
    experiment: Experiment
    schema: Schema

    @property
    def layout(self) -> Layout:
        """Of its tables' rows."""
        return layout_of(self.experiment, self.schema)


def start_from(learner: Learner, experiment: Experiment, *, schema: Schema, run: Path) -> int:
    """Fills tables, head and optimizer states from the run that the experiment names; `start.json` says which.

    An FNN takes an FM's rows without their states, as published. Returns the steps that the tables' states have seen.

    Raises:
        Fault, Faults: that run has not finished or is damaged, or its rows have another size or another meaning.
    """
    source, here = read_source(experiment, schema), learner.network.layout
    if learner.world.rank == 0:
        refuse_other_rows(source, schema, transform=run / "transform")
    refuse_damaged(source.checkpoint, world=learner.world)
    barrier()
    sharded, optimizer = learner.sharded, learner.optimizer
    names, saved = sizes_here(sharded, optimizer=optimizer), sizes_of(source.checkpoint)
    tables = shared_tables(source.layout, here)
    head = [name for name, size in names.items() if name.startswith(_HEAD) and saved.get(name) == size]
    restore_parts(source.checkpoint, [*head, *map(_weights, tables)], sharded=sharded, optimizer=optimizer)
    sharded.start_states()
    optimizer.start()
    alike = [table for table in tables if names[_weights(table)][1:] == saved[_weights(table)][1:]]
    chosen = _states(source.experiment, experiment, head=head, tables=alike) if experiment.train.start_from else ()
    states = [name for name in chosen if name in names and name in saved and names[name][1:] == saved[name][1:]]
    restore_parts(source.checkpoint, states, sharded=sharded, optimizer=optimizer)
    if learner.world.rank == 0:
        _tell(run, source, schema=schema, taken={*head, *map(_weights, tables), *states}, names=names)
    progress = read_progress(source.checkpoint)
    of_tables = any(not name.startswith("dense.") for name in states)
    return progress.steps_before + progress.step if of_tables else 0


def read_source(experiment: Experiment, schema: Schema) -> Source:
    """The run that an experiment starts from.

    Raises:
        Fault: there is none, it has not finished, it shares no table, or its vectors have another size.
    """
    run, fm = experiment.starts_from or Path(), experiment.train.start_from is None
    place = "model.init_from_fm" if fm else "train.start_from"
    newest = latest(run) if (run / "experiment.json").is_file() else None
    if newest is None or not newest[1].finished:
        remedy = "name the folder of a finished run, or finish that one by its own command"
        raise Fault(place, got=f"{run}: no finished run", wanted="one that 'recsys train' finished", remedy=remedy)
    source = Source(run, best(run), read_experiment(run), read_schema(run))
    there, here = source.layout, layout_of(experiment, schema)
    other_size = there.vectors and here.vectors and there.sizes.dim != here.sizes.dim
    if other_size or (fm and not (there.vectors and there.linear)) or not shared_tables(there, here):
        got = f"{run}: model '{source.experiment.model.kind}' with embedding.dim {there.sizes.dim}"
        wanted = f"vectors of {here.sizes.dim} {'and first-order weights' if fm else 'on a table that both have'}"
        raise Fault(place, got=got, wanted=wanted, remedy="name another run, or set embedding.dim to that run's")
    return source


def refuse_other_rows(source: Source, schema: Schema, *, transform: Path) -> None:
    """Raises Faults, one for each table whose first rows are not those of the run that is started from."""
    old = {table.name: table.rows for table in source.schema.tables}
    remedy = f"make the data with 'etl run --extend' of the dataset folder of {source.run}, or name a run on this data"
    faults = [
        Fault(f"table '{name}'", got=got, wanted=f"the {old[name]:,} rows of {source.run}", remedy=remedy)
        for name, rows in ((table.name, table.rows) for table in schema.tables if table.name in old)
        if (got := _other_rows(name, old=source.run / "transform", new=transform, added=rows - old[name]))
    ]
    if faults:
        raise Faults(faults)


def _other_rows(table: str, *, old: Path, new: Path, added: int) -> str | None:
    """What is wrong with the first rows of a table."""
    if added < 0:
        return f"{-added:,} rows less"
    if _rules(old, table) != _rules(new, table):
        return "rows by another rule"
    before, now = (folder / "vocabulary" / f"{table}.parquet" for folder in (old, new))
    if not (before.is_file() and now.is_file()):
        return f"{added:,} rows more, and no vocabulary" if added else None
    keys, first = (pq.read_table(path, columns=["key"])["key"] for path in (before, now))
    return None if keys.equals(first.slice(0, len(keys))) else "other values on the rows of the old vocabulary"


def _rules(transform: Path, table: str) -> set[str]:
    """What decides the rows of a table: a vocabulary, a hash, edges of buckets."""
    path = transform / "transform.json"
    steps = read_json(path, remedy="run the ETL again")["features"] if path.is_file() else []
    return {
        json.dumps([step.get(key) for key in ("kind", "rows", "boundaries", "inputs")])
        for step in steps
        if step["table"] == table
    }


def shared_tables(there: Layout, here: Layout) -> list[str]:
    """Tables of both whose columns mean the same: a vector of one size first, or a first-order weight alone."""
    old, new = there.vector_sizes(), here.vector_sizes()
    return [table for table, size in new.items() if old.get(table) == size]


def _weights(table: str) -> str:
    return f"model.tables.embedding_bags.{table}.weight"


def _states(there: Experiment, here: Experiment, *, head: Sequence[str], tables: Sequence[str]) -> Iterator[str]:
    """Names of the states of what was taken, where the optimizers are the same."""
    linear = [own.embedding.linear.optimizer if own.embedding.linear else None for own in (there, here)]
    if there.train.optimizer == here.train.optimizer and linear[0] == linear[1]:
        for name in head:
            yield from (f"dense.{name.removeprefix('model.')}.{state}" for state in ("state0", "state1", "step"))
    if there.embedding.optimizer == here.embedding.optimizer and linear[0] == linear[1]:
        for table in tables:
            yield from _states_of(table)


def _states_of(table: str) -> tuple[str, str]:
    return f"tables.tables.embedding_bags.{table}.weight.{table}.momentum1", f"second.{table}.momentum1"


def _tell(run: Path, source: Source, *, schema: Schema, taken: Collection[str], names: Collection[str]) -> None:
    """Writes `start.json`: what was taken, what not; the log names what another start might have taken too."""
    here = [name.removeprefix(_TABLES).removesuffix(".weight") for name in names if name.startswith(_TABLES)]
    old = {table.name: table.rows for table in source.schema.tables}
    tables = {
        table: {
            "rows": schema.rows(table),
            "rows_taken": old[table] if _weights(table) in taken else 0,
            "states_taken": all(name in taken for name in _states_of(table) if name in names),
        }
        for table in sorted(here)
    }
    rest = sorted(name for name in names if not name.startswith(_TABLES) and name.startswith(("model.", "dense.")))
    dense = {"taken": [n for n in rest if n in taken], "initialised": [n for n in rest if n not in taken]}
    about = {"run": str(source.run), "checkpoint": source.checkpoint.name, "tables": tables, "dense": dense}
    write_json(run / "start.json", about)
    new = [table for table, own in tables.items() if not own["rows_taken"]]
    new += [f"optimizer states of {table}" for table, own in tables.items() if not own["states_taken"]]
    new += [name for name in dense["initialised"] if name.startswith(_HEAD)]
    if new:
        _LOG.warning("started from %s; new are %s", source.checkpoint, ", ".join(new))
    if _reads(source.schema) != _reads(schema):
        _LOG.warning("the head reads other features than in %s; weights of equal shape were taken", source.run)


def _reads(schema: Schema) -> tuple[list[str], list[str], list[str]]:
    """What a head sees, in its order."""
    return schema.id_names, schema.dense_names, schema.task_names
