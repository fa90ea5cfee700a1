"""Sends ids ahead: while a step computes, the next step's ids already travel to the ranks that hold their rows.

Of a sharded lookup the exchange of ids does not depend on weights, so it may run before the step that comes first has
moved them; lookups and everything after keep their order, and so does every number.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torchrec import KeyedJaggedTensor

from recsys.data import Batch
from recsys.parallel.shard import Sharded


class IdsAhead:
    """Takes over the tables' forward pass in training; without a batch sent ahead it is torchrec's own."""

    def __init__(self, sharded: Sharded) -> None:
        self._network: Any = sharded.model.module
        self._tables = self._network.tables
        self._lookup = self._tables.forward
        self._sent: tuple[Any, Any] | None = None
        self._next: Batch | None = None
        self._tables.forward = self._forward

    def batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; each has to be trained on, once, before the next is taken."""
        batch = next(batches, None)
        if batch is not None:
            self._send(batch)
        try:
            while batch is not None:
                self._next = next(batches, None)
                yield batch
                batch = self._next
        finally:
            self._sent = self._next = None

    def _send(self, batch: Batch) -> None:
        ids_BS = batch.ids_BS.to(self._network.columns.device, non_blocking=True)
        context = self._tables.create_context()
        self._sent = context, self._tables.input_dist(context, self._network.lookups(ids_BS))

    def _forward(self, lookups: KeyedJaggedTensor) -> Any:
        if self._sent is None or not torch.is_grad_enabled():
            return self._lookup(lookups)
        context, sent = self._sent
        self._sent = None
        pooled = self._tables.compute_and_output_dist(context, sent.wait().wait())
        if self._next is not None:
            self._send(self._next)
        return pooled
