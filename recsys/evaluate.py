"""Scores a split with a trained network: metrics for people, predictions for the report."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from etl.artifact import write_parquet
from etl.schema import read_schema
from recsys.checkpoint import best
from recsys.data import Slice, Split
from recsys.experiment import read_experiment
from recsys.metrics import Metrics, task_metrics
from recsys.network import build_network
from recsys.parallel.shard import shard
from recsys.parallel.state import restore_tables_and_head
from recsys.parallel.world import World, gather_steps, open_world


def score_split(model: nn.Module, split: Split, *, world: World, batch_size: int) -> tuple[Tensor, Tensor]:
    """Labels and logits [R, T] of all rows in file order, on every rank, on the CPU."""
    model.eval()
    steps = []
    with torch.no_grad():
        for batch in split.in_file_order(Slice(world.rank, world.size, batch_size)):
            own = batch.to(world.device)
            logits_BT = model(own.ids_BF, own.dense_BN)
            steps.append(torch.cat([own.labels_BT, logits_BT.float(), own.weights_B[:, None]], dim=1))
    model.train()
    rows = gather_steps(torch.stack(steps)).cpu()
    rows = rows[rows[:, -1] > 0]
    tasks = (rows.shape[1] - 1) // 2
    return rows[:, :tasks], rows[:, tasks : 2 * tasks]


def evaluate_model(
    model: nn.Module, split: Split, *, tasks: list[str], world: World, batch_size: int
) -> tuple[Metrics, pa.Table]:
    """Metrics, and probabilities `<task>` beside labels `<task>/label`, float32."""
    labels_RT, logits_RT = score_split(model, split, world=world, batch_size=batch_size)
    metrics = task_metrics(tasks, labels_RT=labels_RT.double().numpy(), logits_RT=logits_RT.double().numpy())
    columns = {}
    for at, task in enumerate(tasks):
        columns[task] = logits_RT[:, at].sigmoid().numpy().astype(np.float32)
        columns[f"{task}/label"] = labels_RT[:, at].numpy()
    return metrics, pa.table(columns)


def write_predictions(run: Path, split: str, *, table: pa.Table) -> None:
    """`predictions/<split>.parquet` of a run, whole or not at all."""
    folder = run / "predictions"
    folder.mkdir(exist_ok=True)
    write_parquet(folder / f"{split}.parquet", table)


def evaluate(run: Path, *, data: Path | None, split: str) -> Metrics | None:
    """The best checkpoint's metrics on a split; on other ranks than 0, None. Writes the predictions into the run.

    Raises:
        Fault: the run has no checkpoint, or the dataset folder lacks the split.
    """
    experiment, schema = read_experiment(run), read_schema(run)
    with open_world(experiment.train.device) as world:
        network = build_network(experiment, schema, table_device="meta")
        model = shard(network, experiment.embedding, world=world, seed=experiment.seed)
        restore_tables_and_head(best(run), model)
        rows = Split((data or run.parent / "data") / split, schema)
        batch_size = experiment.train.batch_size
        metrics, table = evaluate_model(model, rows, tasks=schema.task_names, world=world, batch_size=batch_size)
        if world.rank == 0:
            write_predictions(run, split, table=table)
            return metrics
        return None
