"""What each precision of a served network costs on the validation rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from deploy.bundle import Cost
from deploy.program import Precision, ServedNetwork, served_network
from etl.faults import Fault
from etl.schema import Schema
from recsys.data import Slice, Split
from recsys.experiment import Export
from recsys.metrics import task_metrics
from recsys.network import Network

PRECISIONS = (
    Precision("fp32", "fp32"),
    Precision("fp32", "bf16"),
    Precision("fp16", "fp32"),
    Precision("int8", "fp32"),
    Precision("int8", "bf16"),
)
_BATCH_ROWS = 4096


def costs(network: Network, schema: Schema, *, valid: Path, limit_rows: int) -> tuple[Cost, ...]:
    """Every precision on the first validation rows, fp32 first; none where there is no such folder."""
    if not valid.is_dir():
        return ()
    split = Split(valid, schema)
    found: list[Cost] = []
    exact_RT: npt.NDArray[np.float32] | None = None
    for precision in PRECISIONS:
        served = served_network(network, precision)
        labels_RT, logits_RT, weights_RT = _scored(served, split, limit_rows=limit_rows)
        metrics = task_metrics(schema.task_names, labels_RT=labels_RT, logits_RT=logits_RT, weights_RT=weights_RT)
        probability_RT = torch.from_numpy(logits_RT).sigmoid().numpy()
        exact_RT = probability_RT if exact_RT is None else exact_RT
        found.append(
            Cost(
                tables=precision.tables,
                dense=precision.dense,
                size_bytes=sum(tensor.nbytes for tensor in served.weights_by_name().values()),
                rows=len(labels_RT),
                auc=_by_task(metrics, "auc", tasks=schema.task_names),
                ne=_by_task(metrics, "ne", tasks=schema.task_names),
                difference=float(np.abs(probability_RT - exact_RT).max()),
            )
        )
    return tuple(found)


def refuse_costly(found: Sequence[Cost], precision: Precision, *, budget: Export) -> None:
    """Raises Fault where AUC or NE of a task moves by more than the budget, either way, or nothing can be compared."""
    if precision == Precision():
        return
    if not found:
        got, remedy = "no validation rows", "name the dataset folder with --data, or export fp32"
        raise Fault("the precision of the bundle", got=got, wanted=f"rows to judge {precision} on", remedy=remedy)
    exact, chosen = found[0], next(cost for cost in found if (cost.tables, cost.dense) == tuple(precision))
    for metric, allowed in (("auc", budget.auc_budget), ("ne", budget.ne_budget)):
        before, after = getattr(exact, metric), getattr(chosen, metric)
        for task, value in before.items():
            if value is not None and not abs(after[task] - value) <= allowed:
                got = f"{metric} {after[task]:.6f} of task '{task}', {value:.6f} at full precision ({precision})"
                remedy = f"export a higher precision, or raise export.{metric}_budget knowingly"
                raise Fault("the precision of the bundle", got=got, wanted=f"a change of {allowed:g}", remedy=remedy)


def cost_lines(found: Sequence[Cost]) -> list[str]:
    """A table for people, a line each; of several tasks the first one's figures."""
    if not found:
        return []
    task = next(iter(found[0].auc))
    lines = [f"{'tables':7}{'dense':7}{'MB':>10}{'AUC':>10}{'NE':>10}{'largest difference':>21}"]
    for cost in found:
        figures = "".join(f"{'-' if x is None else format(x, '.5f'):>10}" for x in (cost.auc[task], cost.ne[task]))
        lines.append(f"{cost.tables:7}{cost.dense:7}{cost.size_bytes / 1e6:10.2f}{figures}{cost.difference:21.1e}")
    return [*lines, f"of task '{task}', on {found[0].rows:,} validation rows"]


def _scored(
    served: ServedNetwork, split: Split, *, limit_rows: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Labels, logits and weights [R, T] of the first rows."""
    parts, rows = [], 0
    with torch.inference_mode():
        for batch in split.in_file_order(Slice(0, 1, _BATCH_ROWS)):
            real_B = batch.real_B > 0
            logits_BT = served.logits_BT(batch.ids_BS, batch.floats_BN)
            parts.append(torch.stack([batch.labels_BT, logits_BT, batch.weights_BT])[:, real_B][:, : limit_rows - rows])
            rows += parts[-1].shape[1]
            if rows >= limit_rows:
                break
    labels_RT, logits_RT, weights_RT = torch.cat(parts, dim=1).numpy()
    return labels_RT, logits_RT, weights_RT


def _by_task(metrics: Mapping[str, object], name: str, *, tasks: Sequence[str]) -> dict[str, float | None]:
    keys = {task: f"{task}/{name}" if len(tasks) > 1 else name for task in tasks}
    return {task: value if isinstance(value := metrics[key], float) else None for task, key in keys.items()}
