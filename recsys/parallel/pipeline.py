"""Sends ids ahead: while a step computes, the next step's ids already travel to the ranks that hold their rows.

Of a sharded lookup the exchange of ids does not depend on weights, so it may run before the step that comes first has
moved them; lookups and everything after keep their order, and so does every number. torchrec's pipelines do it; the
order of their stages is that of their `progress`, which would take over the step as well.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist, TrainPipelineSparseDist
from torchrec.streamable import Pipelineable

from recsys.clock import Clock
from recsys.data import Batch
from recsys.parallel.shard import Sharded


class IdsAhead:
    """Hands out batches whose ids are under way; without one the tables' forward pass is torchrec's plain one."""

    def __init__(self, sharded: Sharded, *, clock: Clock) -> None:
        """`clock` laps "data" where this rank waits for a batch, "comm" where it sends ids or waits for other ranks."""
        self._clock, self._cached, self._pipeline = clock, sharded.cached, cast("_Sending | _Prefetching | None", None)
        self._network: Any = sharded.model.module
        self._device = self._network.columns.device
        # FBGEMM remembers the first stream that it fetched rows on.
        self._aside = torch.cuda.Stream() if sharded.cached else None  # type: ignore[no-untyped-call]
        self._network.tables.register_forward_hook(self._looked_up)
        self._network.register_forward_hook(self._launched)

    def batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; each has to be trained on, once, before the next is taken."""
        kind, tables = _Prefetching if self._cached else _Sending, _Tables(self._network.tables)
        self._pipeline = pipeline = kind(tables, None, self._device)  # the optimizer is the step's
        if self._aside:
            pipeline._prefetch_stream, pipeline._default_stream = self._aside, torch.cuda.current_stream()
        given = map(self._with_lookups, batches)
        try:
            pipeline.fill_pipeline(given)
            while pipeline.batches:
                pipeline.enqueue_batch(given)
                self._clock.lap("data")
                pipeline.begin_step()
                self._clock.lap("comm")
                yield cast(_Looked, pipeline.batches[0]).batch
                pipeline.end_step()
        finally:
            self._pipeline = None
            pipeline.detach()
            for cached in self._cached:
                cached.drop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Between two steps: lookups of an evaluation, while ids of the next step stay under way."""
        if (pipeline := self._pipeline) is None:
            yield
            return
        pipeline.detach()
        yield
        pipeline.attach(sparse_dist=False)

    def _with_lookups(self, batch: Batch) -> "_Looked":
        batch = batch.to(self._device)
        return _Looked(batch, self._network.lookups(batch.ids_BS))

    def _looked_up(self, *hooked: Any) -> Any:
        if self._pipeline is None or not torch.is_grad_enabled():
            return None
        self._clock.lap("lookup")
        rows = hooked[-1].wait()  # what the tables answer
        if self._device.type == "cpu":
            self._pipeline.send()
        self._clock.lap("comm")
        return rows

    def _launched(self, *_: Any) -> None:
        """On a GPU the head has its work by now, and the host may wait."""
        if self._pipeline is not None and torch.is_grad_enabled():
            self._pipeline.send()


@dataclass
class _Looked(Pipelineable):  # type: ignore[misc]
    """A batch and the ids of its lookup, on their device."""

    batch: Batch
    lookups: KeyedJaggedTensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "_Looked":
        return self

    def record_stream(self, stream: torch.Stream) -> None:
        for part in (self.lookups, *vars(self.batch).values()):
            if isinstance(part, KeyedJaggedTensor) or (isinstance(part, torch.Tensor) and part.is_cuda):
                part.record_stream(stream)


class _Tables(nn.Module):
    """What torchrec takes to find the tables, and that they look up an attribute of what comes with a batch."""

    def __init__(self, tables: nn.Module) -> None:
        super().__init__()
        self.tables = tables

    def forward(self, given: _Looked) -> Any:
        return self.tables(given.lookups)


class _Sending(TrainPipelineSparseDist[_Looked, None]):  # type: ignore[misc]
    """The ranks tell one another how many ids they will send while a step looks its own up; then the ids leave."""

    def begin_step(self) -> None:
        self._set_module_context(self.contexts[0])
        self._wait_for_batch()
        if len(self.batches) > 1:
            self.start_sparse_data_dist(self.batches[1], self.contexts[1])

    def send(self) -> None:
        """The ids of the next step; once."""
        if len(self.batches) > 1:
            self.wait_sparse_data_dist(self.contexts[1])

    def end_step(self) -> None:
        self.send()
        self.dequeue_batch()


class _Prefetching(PrefetchTrainPipelineSparseDist[_Looked, None]):  # type: ignore[misc]
    """Rows of the next step come into the cache on the GPU as well, while the head computes.

    FBGEMM brings this step's update to them wherever they are by then.
    """

    def begin_step(self) -> None:
        self._set_module_context(self.contexts[0])
        torch.cuda.current_stream().wait_stream(self._prefetch_stream)
        self.batches[0].record_stream(torch.cuda.current_stream())
        if len(self.batches) > 1:
            self.wait_sparse_data_dist(self.contexts[1])

    def send(self) -> None:
        """The rows of the next step into the cache; once."""
        if len(self.batches) > 1 and self.contexts[1].input_dist_tensors_requests:
            self._prefetch(self.contexts[1])

    def end_step(self) -> None:
        self.send()
        if len(self.batches) > 2:
            self.start_sparse_data_dist(self.batches[2], self.contexts[2])
        self.dequeue_batch()
