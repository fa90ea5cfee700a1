"""Tables in host memory behind a cache on the GPU, into which rows may come before their lookup.

FBGEMM keeps the places of rows that were fetched ahead in a queue: the next lookup takes the oldest ones for its own,
whatever ids it is given. And it locks fetched rows in the cache until the backward pass of their lookup.
"""

from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor


class Cached:
    """Lets lookups without a backward pass, as those of an evaluation, come between a fetch and its lookup."""

    def __init__(self, tables: SplitTableBatchedEmbeddingBagsCodegen) -> None:
        """Takes over the lookup; whoever else does has to come first."""
        if not tables.prefetch_pipeline:  # it would then bring a step's update to places that others may hold by now
            raise RuntimeError("FBGEMM's cache does not know that rows are fetched ahead")
        self._tables, self._lookup = tables, tables.forward
        tables.forward = self._forward

    def drop(self) -> None:
        """Gives up what was fetched ahead: its lookup will fetch it again."""
        tables = self._tables
        if tables.prefetch_stream is not None:
            torch.cuda.current_stream().wait_stream(tables.prefetch_stream)
        for places in tables.lxu_cache_locations_list:
            torch.ops.fbgemm.lxu_cache_locking_counter_decrement(tables.lxu_cache_locking_counter, places)
        tables.lxu_cache_locations_list.clear()
        tables.timesteps_prefetched.clear()

    def forget(self) -> None:
        """Empties the cache: the rows in host memory are others now."""
        self.drop()
        self._tables.reset_cache_states()

    def _forward(self, *given: Any, **named: Any) -> Tensor:
        if torch.is_grad_enabled():
            return torch.as_tensor(self._lookup(*given, **named))
        self.drop()
        self._tables.lock_cache_line = False  # no backward pass would unlock them
        try:
            return torch.as_tensor(self._lookup(*given, **named))
        finally:
            self._tables.lock_cache_line = True


def is_cached(tables: Any) -> bool:
    """Whether an FBGEMM module has a cache on the GPU."""
    return isinstance(tables, SplitTableBatchedEmbeddingBagsCodegen) and tables.lxu_cache_weights.numel() > 0
