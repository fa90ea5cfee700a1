"""Scores a split with a trained network: metrics for people, predictions for the report."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn

from etl.artifact import write_parquet
from etl.faults import Fault
from etl.schema import read_schema
from recsys.checkpoint import best, refuse_damaged
from recsys.data import Slice, Split
from recsys.experiment import read_experiment
from recsys.metrics import Metrics, task_metrics
from recsys.network import build_network
from recsys.parallel.shard import shard
from recsys.parallel.state import restore_weights
from recsys.parallel.world import World, gather_rows, open_world
from recsys.run_folder import refuse_other_transform

SPLITS = ("train", "valid", "test")


class ScoredRows(NamedTuple):
    """Rows of a split in file order, on every rank and on the CPU: labels, logits and weights [R, T], groups or None.

    A weight is 0 where a row does not count for a task.
    """

    labels_RT: Tensor
    logits_RT: Tensor
    weights_RT: Tensor
    groups_R: Tensor | None


def score_split(model: nn.Module, split: Split, *, world: World, batch_size: int) -> ScoredRows:
    """Scores every row once."""
    model.eval()
    floats, groups = [], []
    with torch.no_grad():
        for batch in split.in_file_order(Slice(world.rank, world.size, batch_size)):
            own = batch.to(world.device)
            logits_BT = model(own.ids_BS, own.floats_BN).logits_BT.float()
            floats.append(torch.cat([own.real_B[:, None], own.labels_BT, logits_BT, own.weights_BT], dim=1))
            groups.append(own.groups_BG)
    model.train()
    rows = gather_rows(torch.stack(floats)).cpu()
    real = rows[:, 0] > 0
    labels_RT, logits_RT, weights_RT = rows[real, 1:].chunk(3, dim=1)
    by_group = gather_rows(torch.stack(groups)).cpu()[real]
    return ScoredRows(labels_RT, logits_RT, weights_RT, by_group[:, 0] if by_group.shape[1] else None)


def evaluate_model(
    model: nn.Module, split: Split, *, tasks: list[str], world: World, batch_size: int, place: str
) -> tuple[Metrics, pa.Table]:
    """Metrics, and float32 probabilities `<task>` beside labels `<task>/label`, NaN where a row does not count.

    Raises:
        Fault: a logit is not finite, on all ranks; `place` says whose.
    """
    rows = score_split(model, split, world=world, batch_size=batch_size)
    if len(broken := (~rows.logits_RT.isfinite()).any(dim=1).nonzero()):
        got = f"no finite score of {len(broken):,} of {len(rows.logits_RT):,} rows, first {split.place(int(broken[0]))}"
        remedy = "look at that row, or train anew with lower learning rates"
        raise Fault(place, got=got, wanted="finite scores", remedy=remedy)
    metrics = task_metrics(
        tasks,
        labels_RT=rows.labels_RT.double().numpy(),
        logits_RT=rows.logits_RT.double().numpy(),
        weights_RT=rows.weights_RT.double().numpy(),
        groups_R=None if rows.groups_R is None else rows.groups_R.numpy(),
    )
    columns = {}
    for at, task in enumerate(tasks):
        columns[task] = _floats(rows.logits_RT[:, at].sigmoid().numpy())
        columns[f"{task}/label"] = _floats(rows.labels_RT[:, at].where(rows.weights_RT[:, at] > 0, torch.nan).numpy())
    return metrics, pa.table(columns)


def _floats(values_R: npt.NDArray[np.float32]) -> pa.Array:
    """A column of them. Arrow's own conversion would load pandas, too."""
    whole = np.ascontiguousarray(values_R, np.float32)
    return pa.Array.from_buffers(pa.float32(), len(whole), [None, pa.py_buffer(whole)])


def write_predictions(run: Path, split: str, *, table: pa.Table) -> None:
    """`predictions/<split>.parquet` of a run, whole or not at all."""
    folder = run / "predictions"
    folder.mkdir(exist_ok=True)
    write_parquet(folder / f"{split}.parquet", table)


def evaluate(run: Path, *, data: Path | None, split: str) -> Metrics | None:
    """The best checkpoint's metrics on a split; on other ranks than 0, None. Writes the predictions into the run.

    Raises:
        Fault: the run has no checkpoint, its files are not as they were written, or the dataset folder is of another
            transform or lacks the split.
    """
    if split not in SPLITS:
        raise Fault("--split", got=split, wanted=f"one of {', '.join(SPLITS)}", remedy="choose one of these")
    experiment, schema, data = read_experiment(run), read_schema(run), data or run.parent / "data"
    with open_world(experiment.train.device) as world:
        if world.rank == 0:
            refuse_other_transform(run, data)
        network = build_network(experiment, schema, table_device="meta")
        sharded = shard(network, experiment.embedding, world=world, seed=experiment.seed)
        refuse_damaged(found := best(run), world=world)
        restore_weights(found, sharded)
        rows = Split(data / split, schema)
        batch_size = experiment.train.batch_size
        metrics, table = evaluate_model(
            sharded.model, rows, tasks=schema.task_names, world=world, batch_size=batch_size, place=str(run)
        )
        if world.rank == 0:
            write_predictions(run, split, table=table)
            return metrics
        return None
