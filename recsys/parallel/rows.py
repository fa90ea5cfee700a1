"""Optimizers of table rows that FBGEMM's fused kernels lack, or run on one core; and regularisation of rows.

The tables stay FBGEMM's, with their place in the plan and in checkpoints; what happens to a gradient is ours:
duplicates are added up, then the rows that the step touched move (or all), by `recsys/parallel/kernels.py` or in torch.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Protocol

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import embedding_bag

from recsys.experiment import Embedding
from recsys.optim import scaled, start_states, state_count, update
from recsys.parallel.kernels import Lookup, Mover, Rule, fits, rule
from recsys.parallel.row_rules import l2_of, moves_every_row, needs_own_rows, parts_of

_CHUNK_ROWS = {"cpu": 1 << 15, "cuda": 1 << 21}
"""Rows that move at once where all do: few enough for a cache, many enough for a GPU."""
_PLACES = {EmbeddingLocation.HOST: "host", EmbeddingLocation.DEVICE: "dev", EmbeddingLocation.MANAGED: "uvm"}


class RowOptimizer:
    """Moves the rows of all tables that this rank holds. `step` counts from 1 and is set before each backward pass."""

    def __init__(self, embedding: Embedding) -> None:
        self._embedding = embedding
        self.groups: list[RowGroup] = []
        self.step = 0
        self.rate = 1.0

    def attach(self, tables: SplitTableBatchedEmbeddingBagsCodegen, vectors: Sequence[int]) -> None:
        """Takes over the backward pass of these tables; their weights have to be initialised by now.

        `vectors` says how many columns of each table, or of its shard, are a vector.
        """
        alike = groupby(range(len(vectors)), key=lambda at: (*tables.embedding_specs[at][1:3], vectors[at]))
        groups = [RowGroup(tables, list(own), embedding=self._embedding, vector=kind[-1]) for kind, own in alike]
        self.groups += groups

        def move(indices: Tensor, offsets: Tensor, *, gradient_BD: Tensor) -> None:
            for group in groups:
                group.move(indices, offsets, gradient_BD=gradient_BD, optimizer=self)

        take_over(tables, tables.placeholder_autograd_tensor, move=move, lookup=_lookup_of(tables))

    def second_beside(self, first: Tensor) -> Tensor:
        """The second states of the rows whose first states are `first`, a view of an FBGEMM module's memory."""
        if not first.numel():  # the shard of a table with fewer rows than ranks: it lies nowhere
            return torch.empty_like(first)
        for group in self.groups:
            begin = (first.data_ptr() - group.states[0].data_ptr()) // first.element_size()
            if group.second_RW is not None and 0 <= begin < group.second_RW.numel():
                return group.second_RW.view(-1)[begin : begin + first.numel()].view(first.shape)
        raise RuntimeError("an optimizer state belongs to no table of this rank")


def hold(tables: SplitTableBatchedEmbeddingBagsCodegen) -> None:
    """Keeps the rows of frozen tables where they are.

    Their lookups still take part in the backward pass: a rank that holds frozen tables alone has to enter the exchange
    of gradients.
    """

    def stay(indices: Tensor, offsets: Tensor, *, gradient_BD: Tensor) -> None:
        """Moves nothing."""

    take_over(tables, tables.placeholder_autograd_tensor, move=stay, lookup=_lookup_of(tables))


def _lookup_of(tables: SplitTableBatchedEmbeddingBagsCodegen) -> Lookup | None:
    return Lookup(tables) if fits(tables) else None


class Move(Protocol):
    """Moves rows by the gradient [B, D] of what was looked up."""

    def __call__(self, indices: Tensor, offsets: Tensor, *, gradient_BD: Tensor) -> None: ...


def take_over(tables: nn.Module, anchor: Tensor, *, move: Move, lookup: Lookup | None = None) -> None:
    """Gives the backward pass of an FBGEMM module to `move`, and perhaps the forward pass to `lookup`.

    `anchor` is a tensor that needs a gradient, without which autograd would leave the lookup out.
    """
    look_up = lookup or tables.forward

    def forward(indices: Tensor, offsets: Tensor, *rest: Any, **named: Any) -> Tensor:
        with torch.no_grad():
            rows_BD = look_up(indices, offsets, *rest, **named)
        if not torch.is_grad_enabled():
            return torch.as_tensor(rows_BD)

        def backward(gradient_BD: Tensor) -> None:
            move(indices, offsets, gradient_BD=gradient_BD)

        return torch.as_tensor(_Lookup.apply(anchor, rows_BD, backward))  # type: ignore[no-untyped-call]

    tables.forward = forward


class _Lookup(Function):
    """Hands the gradient of looked up rows to a function that moves the rows."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, rows_BD: Tensor, backward: Any) -> Tensor:
        ctx.move = backward
        return rows_BD.view_as(rows_BD)

    @staticmethod
    def backward(ctx: Any, gradient_BD: Tensor) -> tuple[None, None, None]:
        ctx.move(gradient_BD)
        return None, None, None


class RowGroup:
    """Neighbouring tables of one row width in one memory of an FBGEMM module, as a matrix [R, W], with states of the
    same shape, or [R, 1] where that is how FBGEMM keeps the first."""

    def __init__(
        self, tables: SplitTableBatchedEmbeddingBagsCodegen, own: list[int], *, embedding: Embedding, vector: int
    ) -> None:
        width = tables.embedding_specs[own[0]][1]
        self.parts = parts_of(embedding, vector=vector, width=width)
        l2_W = l2_of(embedding, vector=vector, width=width)
        self._embedding = embedding
        self.weights_RW = _matrix(tables, own, name="weights", width=width)
        self.l2_W = None if l2_W is None else l2_W.to(self.weights_RW.device)
        self.states = list(self._states_of(tables, own, embedding=embedding))
        own_features = [at for at, table in enumerate(tables.feature_table_map) if table in own]
        offsets = {at: int(tables.weights_physical_offsets[at]) for at in own}
        bases = [(offsets[tables.feature_table_map[at]] - min(offsets.values())) // width for at in own_features]
        self.base_F = torch.tensor(bases, device=self.weights_RW.device)
        self.features = slice(own_features[0], own_features[-1] + 1)
        if len(own_features) != self.features.stop - self.features.start:
            raise RuntimeError(f"features of width {width} do not stand side by side: {own_features}")
        ends = torch.as_tensor(tables.D_offsets).tolist()
        self.columns = slice(ends[self.features.start], ends[self.features.stop])
        self._mover: Mover | None = None
        if fits(tables):
            begin, l2_W = self.columns.start, self._touched_l2_W
            self._mover = Mover(self.weights_RW, self.states, base_F=self.base_F, column=begin, l2_W=l2_W)
        self.start()

    def _states_of(
        self, tables: SplitTableBatchedEmbeddingBagsCodegen, own: list[int], *, embedding: Embedding
    ) -> Iterator[Tensor]:
        """The first where FBGEMM has it, the second in a memory of the same kind."""
        fused = not needs_own_rows(embedding)
        if fused and embedding.optimizer == "sgd":
            return
        width = 1 if fused and embedding.rowwise else self.weights_RW.shape[1]
        first = _matrix(tables, own, name="momentum1", width=width)
        yield first
        if max(state_count(embedding), state_count(embedding.linear or embedding)) > 1:
            spilled = tables.embedding_specs[own[0]][2] == EmbeddingLocation.MANAGED
            yield (_spilled_zeros if spilled else torch.zeros_like)(first)

    @property
    def second_RW(self) -> Tensor | None:
        """The states that FBGEMM has no place for."""
        return self.states[1] if len(self.states) > 1 else None

    @property
    def _touched_l2_W(self) -> Tensor | None:
        """What regularises rows when a step touches them."""
        return self.l2_W if self._embedding.l2_scope == "batch" else None

    @property
    def _whole_l2_W(self) -> Tensor | None:
        """What regularises rows when a step moves all of them."""
        return self.l2_W if self._embedding.l2_scope == "table" else None

    def start(self) -> None:
        """States where training begins, from the weights as they are."""
        for part in self.parts:
            weights, *states = (values[:, part.start : part.stop] for values in (self.weights_RW, *self.states))
            start_states(part.settings, weights, states=states[: state_count(part.settings)])

    def move(self, indices: Tensor, offsets: Tensor, *, gradient_BD: Tensor, optimizer: RowOptimizer) -> None:
        """One step by the gradient [B, D] of what was looked up: at most one id a feature and row of the batch."""
        every = moves_every_row(self._embedding, self.l2_W, step=optimizer.step)
        if self._mover and not every:
            bounds, rules = self._bounds(offsets, gradient_BD), self._rules(optimizer)
            self._mover.move(indices, bounds, gradient_BD=gradient_BD, rules=rules)
            return
        rows_I, gradient_GW, place_I = self._gradients(indices, offsets, gradient_BD=gradient_BD)
        touched_R, gradient_RW = summed(rows_I, gradient_GW, place_I=place_I)
        memory = [self.weights_RW, *self.states]
        if self._touched_l2_W is not None:
            gradient_RW.addcmul_(self.weights_RW.index_select(0, touched_R), self._touched_l2_W)
        if every:
            self._move_all(touched_R, gradient_RW, optimizer=optimizer)
            return
        own = [whole.index_select(0, touched_R) for whole in memory]
        self._update(own, gradient_RW, optimizer=optimizer)
        for whole, moved in zip(memory, own, strict=True):
            whole.index_copy_(0, touched_R, moved)

    def _move_all(self, touched_R: Tensor, gradient_RW: Tensor, *, optimizer: RowOptimizer) -> None:
        """Every row, in chunks: also of tables beside which there is no room for a gradient of their size."""
        rows, size = len(self.weights_RW), _CHUNK_ROWS[self.weights_RW.device.type]
        begins = list(range(0, rows, size))
        ends = torch.searchsorted(touched_R, touched_R.new_tensor([*begins, rows])).tolist()
        for begin, low, high in zip(begins, ends, ends[1:], strict=False):
            chunk = [whole[begin : begin + size] for whole in (self.weights_RW, *self.states)]
            gradients = gradient_RW.new_zeros(chunk[0].shape)
            gradients.index_copy_(0, touched_R[low:high] - begin, gradient_RW[low:high])
            if self._whole_l2_W is not None:
                gradients.addcmul_(chunk[0], self._whole_l2_W)
            self._update(chunk, gradients, optimizer=optimizer)

    def _update(self, memory: Sequence[Tensor], gradient_RW: Tensor, *, optimizer: RowOptimizer) -> None:
        """Moves weights and states, all [R, W], in place."""
        for part in self.parts:
            weights, *states = (values[:, part.start : part.stop] for values in memory)
            settings, gradients = scaled(part.settings, optimizer.rate), gradient_RW[:, part.start : part.stop]
            states = states[: state_count(settings)]
            update(settings, weights, gradients=gradients, states=states, step=optimizer.step)

    def _rules(self, optimizer: RowOptimizer) -> list[Rule]:
        return [
            rule(scaled(part.settings, optimizer.rate), start=part.start, stop=part.stop, step=optimizer.step)
            for part in self.parts
        ]

    def _bounds(self, offsets: Tensor, gradient_BD: Tensor) -> Tensor:
        """Where the ids of this group's features begin and end, of each row of the batch [F * B + 1]."""
        size = len(gradient_BD)
        return offsets.view(-1)[self.features.start * size : self.features.stop * size + 1]

    def _gradients(self, indices: Tensor, offsets: Tensor, *, gradient_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each id that was looked up its row of the matrix [I]; gradients [G, W] and where each id's stands [I]."""
        size, width, features = gradient_BD.shape[0], self.weights_RW.shape[1], len(self.base_F)
        bounds = self._bounds(offsets, gradient_BD)
        first, last = int(bounds[0]), int(bounds[-1])
        rows_I = indices[first:last] + self.base_F.repeat_interleave(bounds[::size].diff())
        gradient_GW = gradient_BD[:, self.columns].reshape(-1, width)
        place_FB = torch.arange(size * features, device=rows_I.device).view(size, features).t()
        if last - first == size * features:
            return rows_I, gradient_GW, place_FB.reshape(-1)
        return rows_I, gradient_GW, place_FB[bounds.diff().view(features, size) > 0]


def summed(rows_I: Tensor, gradient_GW: Tensor, *, place_I: Tensor) -> tuple[Tensor, Tensor]:
    """The different rows, in order, and the sums of their gradients; id i's gradient is `gradient_GW[place_I[i]]`.

    A sort brings equal rows together, and torch's bag lookup, which adds up rows of a matrix, does the rest.
    """
    if not rows_I.numel():
        return rows_I, gradient_GW[:0]
    sorted_I, order_I = rows_I.sort(stable=True)
    touched_R, count_R = torch.unique_consecutive(sorted_I, return_counts=True)
    starts_R = count_R.cumsum(0) - count_R
    return touched_R, embedding_bag(place_I[order_I], gradient_GW.contiguous(), starts_R, mode="sum")


def _matrix(tables: SplitTableBatchedEmbeddingBagsCodegen, own: list[int], *, name: str, width: int) -> Tensor:
    """What an FBGEMM module keeps of neighbouring tables under this name, [R, width]."""
    place = _PLACES[tables.embedding_specs[own[0]][2]]
    offsets = [int(getattr(tables, f"{name}_physical_offsets")[at]) for at in own]
    sizes = [tables.embedding_specs[at][0] * width for at in own]
    begin = min(offsets)
    if max(at + size for at, size in zip(offsets, sizes, strict=True)) - begin != sum(sizes):
        raise RuntimeError(f"tables of width {width} do not lie side by side: {tables.embedding_specs}")
    memory: Tensor = getattr(tables, f"{name}_{place}").detach()
    return memory[begin : begin + sum(sizes)].view(-1, width)


def _spilled_zeros(like: Tensor) -> Tensor:
    """In host memory that the GPU reads as well, as FBGEMM keeps the first states of such tables."""
    one = like.new_zeros(1)  # says type and device
    zeros: Tensor = torch.ops.fbgemm.new_unified_tensor(one, list(like.shape), is_host_mapped=False).zero_()
    return zeros
