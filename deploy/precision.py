"""What of a served network can be of lower precision, and what that costs, both by the validation rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from deploy.bundle import Cost
from deploy.lookup import Tables
from deploy.program import FULL, Precision, ServedNetwork, served_network, wide_layers, with_bf16
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
_TABLES: tuple[Tables, ...] = ("int8", "fp16", "fp32")
_BATCH_ROWS = 4096
_SHARE = 0.8


class Rows(NamedTuple):
    """Validation rows, as the network reads them."""

    ids_RS: Tensor
    floats_RN: Tensor


def costs(network: Network, schema: Schema, *, valid: Path, limit_rows: int, tolerance: float) -> tuple[Cost, ...]:
    """Every precision on the first validation rows, fp32 first; none where there is no such folder."""
    if not valid.is_dir():
        return ()
    ids_RS, floats_RN, labels_RT, weights_RT = _read(Split(valid, schema), limit_rows=limit_rows)
    found: list[Cost] = []
    fit = Fit(network, Rows(ids_RS, floats_RN), tolerance=tolerance)
    for wanted in PRECISIONS:
        precision = fit.nearest(wanted)
        logits_RT = fit.logits_RT(precision)
        metrics = task_metrics(
            schema.task_names, labels_RT=labels_RT.numpy(), logits_RT=logits_RT.numpy(), weights_RT=weights_RT.numpy()
        )
        found.append(
            Cost(
                tables=wanted.tables,
                dense=wanted.dense,
                finer=None if precision.tables == wanted.tables else precision.tables,
                kept=precision.keep,
                size_bytes=sum(tensor.nbytes for tensor in fit.served(precision).weights_by_name().values()),
                rows=len(labels_RT),
                auc=_by_task(metrics, "auc", tasks=schema.task_names),
                ne=_by_task(metrics, "ne", tasks=schema.task_names),
                difference=fit.change(precision),
            )
        )
    return tuple(found)


class Fit:
    """What a network bears: no probability of the rows may change by more than four fifths of the tolerance, the rest
    is for rows that are not among these. Each precision is measured once, however often it is asked for.
    """

    def __init__(self, network: Network, rows: Rows, *, tolerance: float) -> None:
        self._network, self._rows, self._most = network, rows, _SHARE * tolerance
        self._layers = wide_layers(network.head)
        self._tables: tuple[Tables, ServedNetwork] | None = None
        self._measured: dict[Precision, Tensor] = {}

    def nearest(self, wanted: Precision) -> Precision:
        """What comes nearest to `wanted`.

        Tables take the next finer type. Where all wide layers in bfloat16 are too many, they are lowered one after
        another as long as it holds, first those that alone change least for the products that they save.
        """
        finer = _TABLES[_TABLES.index(wanted.tables) :]
        stored = next((each for each in finer[:-1] if self._holds(Precision(each))), finer[-1])
        if wanted.dense == "fp32" or self._holds(Precision(stored, "bf16")):
            return Precision(stored, wanted.dense)
        alone = {name: self.change(Precision("fp32", "bf16", self._but(name))) for name in self._layers}
        kept = tuple(self._layers)
        for name in sorted(alone, key=lambda name: alone[name] / self._layers[name].weight.numel()):
            fewer = tuple(each for each in kept if each != name)
            kept = fewer if self._holds(Precision(stored, "bf16", fewer)) else kept
        return Precision(stored, "bf16", kept)

    def served(self, precision: Precision) -> ServedNetwork:
        """The network in this precision; the tables of the last one are kept for the next, which often has the same."""
        if self._tables is None or self._tables[0] != precision.tables:
            self._tables = None  # gone before the others are made
            self._tables = precision.tables, served_network(self._network, Precision(precision.tables))
        exact = self._tables[1]
        return exact if precision.dense == "fp32" else with_bf16(exact, keep=precision.keep)

    def logits_RT(self, precision: Precision) -> Tensor:
        """What the probabilities of the rows are made from."""
        if precision not in self._measured:
            self._measured[precision] = _logits_RT(self.served(precision), self._rows)
        return self._measured[precision]

    def change(self, precision: Precision) -> float:
        """The largest change of a probability."""
        probability_RT = self.logits_RT(FULL).sigmoid()
        return float((self.logits_RT(precision).sigmoid() - probability_RT).abs().max())

    def _but(self, name: str) -> tuple[str, ...]:
        return tuple(each for each in self._layers if each != name)

    def _holds(self, precision: Precision) -> bool:
        return self.change(precision) <= self._most


def accepted(found: Sequence[Cost], precision: Precision, *, budget: Export) -> Precision:
    """The precision with what `costs` found to be stored finer or kept.

    Raises Fault where AUC or NE of a task moves by more than the budget, either way, or nothing can be compared.
    """
    if precision == Precision():
        return precision
    if not found:
        got, remedy = "no validation rows", "name the dataset folder with --data, or export fp32"
        raise Fault("the precision of the bundle", got=got, wanted=f"rows to judge {precision} on", remedy=remedy)
    exact, chosen = found[0], _cost_of(found, precision)
    for metric, allowed in (("auc", budget.auc_budget), ("ne", budget.ne_budget)):
        before, after = getattr(exact, metric), getattr(chosen, metric)
        for task, value in before.items():
            if value is not None and not abs(after[task] - value) <= allowed:
                got = f"{metric} {after[task]:.6f} of task '{task}', {value:.6f} at full precision ({precision})"
                remedy = f"export a higher precision, or raise export.{metric}_budget knowingly"
                raise Fault("the precision of the bundle", got=got, wanted=f"a change of {allowed:g}", remedy=remedy)
    return Precision(chosen.finer or chosen.tables, chosen.dense, chosen.kept)


def cost_lines(found: Sequence[Cost]) -> list[str]:
    """A table for people, a line each; of several tasks the first one's figures."""
    if not found:
        return ["no dataset folder: costs of precisions are not known, nor is the drift of values when it serves"]
    task = next(iter(found[0].auc))
    lines = [f"{'tables':7}{'dense':7}{'MB':>10}{'AUC':>10}{'NE':>10}{'largest difference':>21}  kept"]
    for cost in found:
        figures = "".join(f"{'-' if x is None else format(x, '.5f'):>10}" for x in (cost.auc[task], cost.ne[task]))
        kept = ", ".join(([f"tables {cost.finer}"] if cost.finer else []) + [*cost.kept])
        line = f"{cost.tables:7}{cost.dense:7}{cost.size_bytes / 1e6:10.2f}{figures}{cost.difference:21.1e}  {kept}"
        lines.append(line.rstrip())
    return [*lines, f"of task '{task}', on {found[0].rows:,} validation rows"]


def _cost_of(found: Sequence[Cost], precision: Precision) -> Cost:
    return next(cost for cost in found if (cost.tables, cost.dense) == (precision.tables, precision.dense))


def _read(split: Split, *, limit_rows: int) -> tuple[Tensor, ...]:
    """Ids, floats, labels and weights of the first rows."""
    parts, rows = [], 0
    for batch in split.in_file_order(Slice(0, 1, _BATCH_ROWS)):
        real_B = batch.real_B > 0
        tensors = (batch.ids_BS, batch.floats_BN, batch.labels_BT, batch.weights_BT)
        parts.append([tensor[real_B][: limit_rows - rows] for tensor in tensors])
        rows += len(parts[-1][0])
        if rows >= limit_rows:
            break
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _logits_RT(served: ServedNetwork, rows: Rows) -> Tensor:
    parts = [slice(at, at + _BATCH_ROWS) for at in range(0, len(rows.ids_RS), _BATCH_ROWS)]
    with torch.inference_mode():
        return torch.cat([served.logits_BT(rows.ids_RS[part], rows.floats_RN[part]) for part in parts])


def _by_task(metrics: Mapping[str, object], name: str, *, tasks: Sequence[str]) -> dict[str, float | None]:
    keys = {task: f"{task}/{name}" if len(tasks) > 1 else name for task in tasks}
    return {task: value if isinstance(value := metrics[key], float) else None for task, key in keys.items()}
