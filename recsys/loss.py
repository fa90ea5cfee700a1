"""What training minimises: the tasks' logloss, and the regularisers of activations and of the head's weights."""

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from etl.faults import Fault
from recsys.data import Batch
from recsys.models.head import Head
from recsys.models.layers import half_squares
from recsys.network import Scored


def mean_loss(scored: Scored, batch: Batch, *, task_weights_T: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """This rank's share of the step's mean logloss, and the same with the penalty on activations, both times the ranks.

    Gradients are averaged over ranks afterwards. A task's mean is over all rows, also those that its condition leaves
    out; the penalty is a sum over rows, as published.
    """
    summed = _loglosses(scored.logits_BT, batch, task_weights_T=task_weights_T, reduction="sum")
    logloss = summed * (ranks / batch.global_rows)
    if scored.penalty_B is None:
        return logloss, logloss
    return logloss, logloss + (scored.penalty_B * batch.real_B).sum() * ranks


def row_losses(logits_BT: Tensor, batch: Batch, *, task_weights_T: Tensor) -> Tensor:
    """What each row adds to the logloss [B, T], of which `mean_loss` takes the sum."""
    return _loglosses(logits_BT, batch, task_weights_T=task_weights_T, reduction="none")


def _loglosses(logits_BT: Tensor, batch: Batch, *, task_weights_T: Tensor, reduction: str) -> Tensor:
    weights_BT = batch.weights_BT * task_weights_T
    return binary_cross_entropy_with_logits(logits_BT.float(), batch.labels_BT, weight=weights_BT, reduction=reduction)


def penalised_layers(head: Head, layer_l2: float | list[float]) -> list[tuple[nn.Linear, float]]:
    """The linear layers that `layer_l2` regularises, each with its factor; a list gives one for each in their order.

    Raises:
        Fault: another number of layers than of values.
    """
    layers = [module for module in head.modules() if isinstance(module, nn.Linear)]
    factors = layer_l2 if isinstance(layer_l2, list) else [layer_l2] * len(layers)
    if len(factors) != len(layers):
        got, wanted = f"{len(factors)} values", f"one number, or one for each of the {len(layers)} linear layers"
        raise Fault("train.layer_l2", got=got, wanted=wanted, remedy="give as many values as layers")
    return [(layer, l2) for layer, l2 in zip(layers, factors, strict=True) if l2]


def head_penalty(head: Head, layers: list[tuple[nn.Linear, float]]) -> Tensor | None:
    """The regularisers of the head's own weights: those of `penalised_layers`, and what the model adds."""
    terms = [half_squares([layer.weight]) * l2 for layer, l2 in layers]
    if (own := head.penalty()) is not None:
        terms.append(own)
    return torch.stack(terms).sum() if terms else None
