"""The optimizer of data_parallel tables: each rank holds all rows and moves them alike, by the gradients of all ranks.

One all-reduce a step carries the gradients of all these tables and which rows were looked up, so that rows move as they
would if the table were sharded: those that a step touched, once each, or all of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.batched_embedding_kernel import BatchedDenseEmbeddingBag
from torchrec.distributed.embedding_types import ShardedEmbeddingTable

from recsys.experiment import Embedding
from recsys.optim import scaled, start_states, state_count, update
from recsys.parallel.row_rules import l2_of, moves_every_row, needs_own_rows, parts_of
from recsys.parallel.rows import take_over


@dataclass(frozen=True)
class _Copy:
    """One table: weights [R, W], states (of their shape, or [R, 1]), gradients of all ranks, and who was touched.

    `features` are the places of its features in the module's lookups, `columns` those of their gradients.
    """

    name: str
    vector: int
    weights_RW: Tensor
    states: list[Tensor]
    gradient_RW: Tensor
    touched_R: Tensor
    features: range
    columns: list[slice]


class ReplicatedRows:
    """Moves the rows of the data_parallel tables in one FBGEMM module, but for frozen ones.

    `step` counts from 1, set before each step.
    """

    def __init__(self, kernel: BatchedDenseEmbeddingBag, vectors: Mapping[str, int], *, embedding: Embedding) -> None:
        """`vectors`: how many columns of each table are a vector."""
        self._embedding, self.step, self.rate = embedding, 0, 1.0
        tables = kernel.emb_module
        weights = tables.weights.detach()
        moving = [t for t in kernel.config.embedding_tables if not embedding.of(t.name).frozen]
        size = sum(table.num_embeddings * (table.embedding_dim + 1) for table in moving)
        self._sum = torch.zeros(size, device=weights.device)
        self.copies = list(self._copies(kernel.config.embedding_tables, vectors, weights=weights))
        self.start()
        take_over(tables, tables.weights, move=self._move)

    def start(self) -> None:
        """States where training begins, from the weights as they are."""
        for copy in self.copies:
            for columns, settings in self._parts(copy):
                states = [_cut(state, columns) for state in copy.states[: state_count(settings)]]
                start_states(settings, copy.weights_RW[:, columns], states=states)

    def _copies(
        self, tables: Sequence[ShardedEmbeddingTable], vectors: Mapping[str, int], *, weights: Tensor
    ) -> Iterator[_Copy]:
        fused = not needs_own_rows(self._embedding)
        count = max(state_count(self._embedding), state_count(self._embedding.linear or self._embedding))
        begin, summed, feature, column = 0, 0, 0, 0
        for table in tables:
            rows, width, features = table.num_embeddings, table.embedding_dim, len(table.feature_names)
            shape = (rows, 1) if fused and self._embedding.rowwise else (rows, width)  # as FBGEMM keeps it
            if not self._embedding.of(table.name).frozen:
                counted = summed + rows * width
                yield _Copy(
                    name=table.name,
                    vector=vectors[table.name],
                    weights_RW=weights[begin : begin + rows * width].view(rows, width),
                    states=[torch.zeros(shape, device=weights.device) for _ in range(count)],
                    gradient_RW=self._sum[summed:counted].view(rows, width),
                    touched_R=self._sum[counted : counted + rows],
                    features=range(feature, feature + features),
                    columns=[slice(column + at * width, column + (at + 1) * width) for at in range(features)],
                )
                summed = counted + rows
            begin, feature, column = begin + rows * width, feature + features, column + features * width

    def _parts(self, copy: _Copy) -> Iterator[tuple[slice, Any]]:
        for part in parts_of(self._embedding, vector=copy.vector, width=copy.weights_RW.shape[1]):
            yield slice(part.start, part.stop), part.settings

    @torch.no_grad()
    def _move(self, indices: Tensor, offsets: Tensor, *, gradient_BD: Tensor) -> None:
        """One step by the gradient [B, D] of what this rank looked up: at most one id a feature and row."""
        if not self.copies:
            return
        self._sum.zero_()
        filled_FB = offsets.diff().view(-1, gradient_BD.shape[0]) > 0
        ends = filled_FB.sum(dim=1).cumsum(0).tolist()
        for copy in self.copies:
            for at, columns in zip(copy.features, copy.columns, strict=True):
                rows_I = indices[ends[at - 1] if at else 0 : ends[at]]
                gradient_IW = gradient_BD[:, columns]
                if len(rows_I) < len(gradient_IW):
                    gradient_IW = gradient_IW[filled_FB[at]]
                copy.gradient_RW.index_add_(0, rows_I, gradient_IW)
                copy.touched_R[rows_I] = 1.0
        dist.all_reduce(self._sum)
        for copy in self.copies:
            copy.gradient_RW.div_(dist.get_world_size())
            self._update(copy)

    def _update(self, copy: _Copy) -> None:
        embedding, width = self._embedding, copy.weights_RW.shape[1]
        l2_W, whole = l2_of(embedding, vector=copy.vector, width=width), embedding.l2_scope == "table"
        every = moves_every_row(embedding, l2_W, step=self.step)
        touched_R = copy.touched_R.nonzero()[:, 0]
        if l2_W is not None and (every or not whole):
            which: Tensor | slice = slice(None) if whole else touched_R
            copy.gradient_RW[which] += copy.weights_RW[which] * l2_W.to(copy.weights_RW.device)
        which = slice(None) if every else touched_R
        for columns, settings in self._parts(copy):
            weights, gradients = copy.weights_RW[which, columns], copy.gradient_RW[which, columns]
            states = [_cut(state[which], columns) for state in copy.states[: state_count(settings)]]
            update(scaled(settings, self.rate), weights, gradients=gradients, states=states, step=self.step)
            if not every:
                copy.weights_RW[which, columns] = weights
                for whole_state, moved in zip(copy.states, states, strict=False):
                    whole_state[which, columns if whole_state.shape[1] > 1 else slice(None)] = moved


def _cut(state: Tensor, columns: slice) -> Tensor:
    """Some columns of a state; one that holds for whole rows stays as it is."""
    return state[:, columns] if state.shape[1] > 1 else state
