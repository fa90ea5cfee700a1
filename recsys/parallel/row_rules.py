"""What the settings say of a table's rows: who moves them, by which optimizers and regularisers, and when."""

from dataclasses import dataclass

import torch
from torch import Tensor

from recsys.experiment import Embedding
from recsys.optim import OptimizerSettings


def needs_own_rows(embedding: Embedding) -> bool:
    """Whether FBGEMM's fused CPU optimizers can't do what the settings say."""
    fused = embedding.optimizer in ("sgd", "adagrad", "rowwise_adagrad") and embedding.linear is None
    regularised = embedding.l2_scope != "activations" and bool(embedding.l2 or embedding.first_order_l2)
    return not fused or regularised or embedding.update == "all"


@dataclass(frozen=True)
class Part:
    """Columns of a row that one optimizer moves."""

    start: int
    stop: int
    settings: OptimizerSettings


def parts_of(embedding: Embedding, *, vector: int, width: int) -> list[Part]:
    """The parts of a row of `width` columns whose first `vector` are a vector, the others a weight and its padding.

    With one optimizer the row stays whole, as FBGEMM has it: row-wise Adagrad takes its mean over all columns.
    """
    if embedding.linear is None:
        return [Part(0, width, embedding)]
    parts = [Part(0, vector, embedding), Part(vector, width, embedding.linear)]
    return [part for part in parts if part.stop > part.start]


def l2_of(embedding: Embedding, *, vector: int, width: int) -> Tensor | None:
    """The factor of each column [W] whose product with the weights joins their gradients; None where all are 0."""
    if embedding.l2_scope == "activations":
        return None
    l2_W = torch.tensor([embedding.l2] * vector + [embedding.first_order_l2] * (width - vector))
    return l2_W * embedding.l2_every_steps if l2_W.any() else None


def moves_every_row(embedding: Embedding, l2_W: Tensor | None, *, step: int) -> bool:
    """Whether a step moves also the rows that it did not touch; `l2_W` is that of `l2_of`."""
    whole_l2 = l2_W is not None and embedding.l2_scope == "table"
    return embedding.update == "all" or (whole_l2 and step % embedding.l2_every_steps == 0)
