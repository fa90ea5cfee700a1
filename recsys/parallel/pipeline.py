"""Sends ids ahead: while a step computes, the next step's ids already travel to the ranks that hold their rows.

Of a sharded lookup the exchange of ids does not depend on weights, so it may run before the step that comes first has
moved them; lookups and everything after keep their order, and so does every number. Where rows lie in host memory
behind a cache on the GPU, they come into the cache as well while the head computes: FBGEMM brings the step's update to
them wherever they are by then.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torchrec import KeyedJaggedTensor
from torchrec.distributed.types import NoWait

from recsys.clock import Clock
from recsys.data import Batch
from recsys.parallel.shard import Sharded


class IdsAhead:
    """Takes over the tables' forward pass in training; without a batch sent ahead it is torchrec's own."""

    def __init__(self, sharded: Sharded, *, clock: Clock) -> None:
        """`clock` laps "comm" where this rank waits for ids or rows of others."""
        self._clock = clock
        self._network: Any = sharded.model.module
        self._tables = self._network.tables
        self._lookup = self._tables.forward
        self._sent: tuple[Any, Any] | None = None
        self._next: Batch | None = None
        self._tables.forward = self._forward
        self._cached = sharded.cached
        self._aside = torch.cuda.Stream() if sharded.cached else None  # type: ignore[no-untyped-call]
        if sharded.cached:
            self._network.head.register_forward_hook(torch.compiler.disable(self._fetch))  # type: ignore[no-untyped-call]

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
            for cached in self._cached:
                cached.drop()

    def _send(self, batch: Batch) -> None:
        if self._aside:
            self._aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._aside):
            ids_BS = batch.ids_BS.to(self._network.columns.device, non_blocking=True)
            context = self._tables.create_context()
            self._sent = context, self._tables.input_dist(context, self._network.lookups(ids_BS))

    def _arrived(self, context: Any, sent: Any) -> Any:
        """The ids, of use in the stream that computes as well."""
        with torch.cuda.stream(self._aside):
            ids = sent.wait().wait()
        if self._aside:
            for part in (context, ids):
                part.record_stream(torch.cuda.current_stream())
        return ids

    def _fetch(self, *_: Any) -> None:
        """After the head was given its work, once for each batch: the host waits here until the ids have come."""
        if self._sent is None or isinstance(self._sent[1], NoWait) or not torch.is_grad_enabled():
            return
        context, sent = self._sent
        computing, ids = torch.cuda.current_stream(), self._arrived(context, sent)
        with torch.cuda.stream(self._aside):
            self._tables.prefetch(ids, forward_stream=computing, ctx=context)
        self._sent = context, NoWait(NoWait(ids))

    def _forward(self, lookups: KeyedJaggedTensor) -> Any:
        if self._sent is None or not torch.is_grad_enabled():
            return self._lookup(lookups)
        context, sent = self._sent
        self._sent, ids = None, self._arrived(context, sent)
        self._clock.lap("comm")
        if self._aside:
            torch.cuda.current_stream().wait_stream(self._aside)
        pooled = self._tables.compute_and_output_dist(context, ids)
        if self._next is not None:
            self._send(self._next)
        self._clock.lap("lookup")
        in_place = pooled.wait()
        self._clock.lap("comm")
        return in_place
