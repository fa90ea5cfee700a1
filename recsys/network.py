"""The network: embedding tables and a head, single-device; `recsys/parallel` shards it from outside."""

from math import gcd
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor, PoolingType

from etl.artifact import seed_of
from etl.schema import Schema
from etl.spec import dims_of
from recsys.experiment import Embedding, Experiment
from recsys.layout import LANE, Layout
from recsys.models.head import Head, Inputs
from recsys.models.layers import init_head

_CHUNK_ROWS = 65_536


class Scored(NamedTuple):
    """Logits [B, T], and for each row what regularising its activations adds to the loss [B], where anything does."""

    logits_BT: Tensor
    penalty_B: Tensor | None


class Dense(Protocol):
    """The dense part of a network: from the rows that ids looked up to what the network answers."""

    def __call__(self, rows_BD: Tensor, *, ids_BS: Tensor, floats_BN: Tensor) -> Scored: ...


class Network(nn.Module):
    """Tables and head. `forward(ids_BS, floats_BN)` takes both in the schema's order."""

    columns: Tensor

    def __init__(self, layout: Layout, *, tables: EmbeddingBagCollection, head: Head, embedding: Embedding) -> None:
        super().__init__()
        self.layout, self.tables, self.head = layout, tables, head
        self.looked_up = nn.Identity()  # where training's hooks see the rows on their way from the tables to the head
        self.program: Dense | None = None  # made of `score_rows`, which it stands for
        self._names = [name for name, _ in layout.slots]
        self._every_slot_filled = all(run.plain for run in layout.runs)
        self._columns_in_order = layout.columns == tuple(range(len(layout.columns)))
        self._order: tuple[Tensor, Tensor] | None = None
        self._bounds: tuple[Tensor, Tensor] | None = None
        self._l2 = (embedding.l2, embedding.first_order_l2) if embedding.l2_scope == "activations" else (0.0, 0.0)
        self.register_buffer("columns", torch.tensor(layout.columns, dtype=torch.int64), persistent=False)

    def forward(self, ids_BS: Tensor, floats_BN: Tensor) -> Scored:
        return self.score(self.rows(ids_BS), ids_BS=ids_BS, floats_BN=floats_BN)

    def score(self, rows_BD: Tensor, *, ids_BS: Tensor, floats_BN: Tensor) -> Scored:
        """What `forward` answers, from the rows that the ids looked up."""
        run = self.program or self.score_rows
        return run(self.looked_up(rows_BD), ids_BS=ids_BS, floats_BN=floats_BN)

    def score_rows(self, rows_BD: Tensor, *, ids_BS: Tensor, floats_BN: Tensor) -> Scored:
        """The dense part: all that comes after the tables."""
        inputs = self.read(rows_BD, ids_BS=ids_BS, floats_BN=floats_BN)
        l2, linear_l2 = self._l2
        if not (l2 or linear_l2):
            return Scored(self.head(inputs), None)
        return Scored(self.head(inputs), self.head.activation_penalty_B(inputs, l2=l2, linear_l2=linear_l2))

    def inputs(self, ids_BS: Tensor, floats_BN: Tensor) -> Inputs:
        """What the head reads."""
        return self.read(self.rows(ids_BS), ids_BS=ids_BS, floats_BN=floats_BN)

    def rows(self, ids_BS: Tensor) -> Tensor:
        """The rows of all slots side by side [B, D], slot after slot."""
        return self._in_order(self.tables(self.lookups(ids_BS)))

    def read(self, rows_BD: Tensor, *, ids_BS: Tensor, floats_BN: Tensor) -> Inputs:
        """What the head reads, from the rows that the ids looked up."""
        layout, end = self.layout, self.layout.vectors * self.layout.width
        rows_BSW = rows_BD[:, :end].view(len(ids_BS), layout.vectors, layout.width)
        return layout.inputs(rows_BSW, rows_BD[:, end::LANE], ids_BS=ids_BS, floats_BN=floats_BN)

    def lookups(self, ids_BS: Tensor) -> KeyedJaggedTensor:
        """One id or none for each slot and row, slot after slot: bags are pooled outside of the tables."""
        every = self._columns_in_order and ids_BS.shape[1] == len(self._names)
        ids_SB = (ids_BS if every else ids_BS.index_select(1, self.columns)).t()
        if self._every_slot_filled:
            return self._single_ids(ids_SB)
        filled_SB = ids_SB >= 0
        return KeyedJaggedTensor(self._names, ids_SB[filled_SB], lengths=filled_SB.reshape(-1).to(torch.int32))

    def _single_ids(self, ids_SB: Tensor) -> KeyedJaggedTensor:
        """One id for each slot and row; where each begins is the same for all batches of a size."""
        values, (slots, size) = ids_SB.reshape(-1), ids_SB.shape
        if self._bounds is None or len(self._bounds[0]) != len(values) or self._bounds[0].device != values.device:
            lengths = torch.ones_like(values, dtype=torch.int32)
            self._bounds = lengths, torch.arange(len(values) + 1, device=values.device)
        lengths, offsets = self._bounds
        of_keys = [size] * slots
        return KeyedJaggedTensor(
            self._names, values, lengths=lengths, offsets=offsets, stride=size, length_per_key=of_keys
        )

    def _in_order(self, pooled: KeyedTensor) -> Tensor:
        """A sharded lookup answers in the order of its plan, and small vectors without the zeros that follow them."""
        if pooled.keys() == self._names and not self.layout.dims:
            values_BD: Tensor = pooled.values()
            return values_BD
        return torch.as_tensor(_InOrder.apply(pooled.values(), self._order_of(pooled)))  # type: ignore[no-untyped-call]

    def _order_of(self, pooled: KeyedTensor) -> tuple[Tensor, Tensor]:
        """Where each piece of an answer's row belongs, and the way back; answers of one plan are alike."""
        if self._order is None:
            widths = dict(zip(pooled.keys(), pooled.length_per_key(), strict=True))
            size, end, starts = gcd(*widths.values()) if not self.layout.dims else LANE, 0, {}
            for name, width in widths.items():
                starts[name], end = end, end + width
            order = []
            for name, table in self.layout.slots:
                order += [at // size for at in range(starts[name], starts[name] + widths[name], size)]
                if dim := self.layout.dims.get(table):
                    vector_end = len(order) - (widths[name] - dim) // size
                    order[vector_end:vector_end] = [end // size] * ((self.layout.sizes.dim - dim) // size)
            order_P = torch.tensor(order, device=self.columns.device)
            self._order = order_P, order_P.argsort()[: end // size]
        return self._order


class _InOrder(Function):
    """Equal pieces of each row [B, D] in another order, and their gradients in the old one; the piece after the last
    one is zeros, which come as often as the order has them.

    torchrec's `regroup` does the same by a concatenation of slices, in several times the time on CPU.
    """

    @staticmethod
    def forward(ctx: Any, values_BD: Tensor, order: tuple[Tensor, Tensor]) -> Tensor:
        order_P, ctx.back_P = order
        ctx.pieces, held = len(order_P), len(ctx.back_P)
        if ctx.pieces == held:
            return _picked(values_BD, order_P, pieces=held)
        zeros_BP = values_BD.new_zeros(len(values_BD), values_BD.shape[1] // held)
        return _picked(torch.cat([values_BD, zeros_BP], dim=1), order_P, pieces=held + 1)

    @staticmethod
    def backward(ctx: Any, gradient_BD: Tensor) -> tuple[Tensor, None]:
        return _picked(gradient_BD, ctx.back_P, pieces=ctx.pieces), None


def _picked(values_BD: Tensor, order_P: Tensor, *, pieces: int) -> Tensor:
    return values_BD.reshape(len(values_BD), pieces, -1).index_select(1, order_P).flatten(1)


def layout_of(experiment: Experiment, schema: Schema) -> Layout:
    """What the experiment's model reads."""
    return Layout.of(schema, experiment.model, dim=experiment.embedding.dim, dims=dims_of(experiment.features))


def build_network(experiment: Experiment, schema: Schema, *, table_device: str) -> Network:
    """The network with its head initialised from the seed; rows of tables on "meta" are to be filled by `init_rows`."""
    layout = layout_of(experiment, schema)
    head = experiment.model.build(layout.sizes)
    init_head(head, torch.Generator().manual_seed(experiment.seed))
    tables = tables_of(layout, schema, device=table_device)
    return Network(layout, tables=tables, head=head, embedding=experiment.embedding)


def tables_of(layout: Layout, schema: Schema, *, device: str) -> EmbeddingBagCollection:
    """The tables of a layout, each looked up by its slots."""
    configs = [
        EmbeddingBagConfig(
            name=name,
            num_embeddings=schema.rows(name),
            embedding_dim=width,
            feature_names=[slot for slot, table in layout.slots if table == name],
            pooling=PoolingType.SUM,
        )
        for name, width in layout.widths().items()
    ]
    return EmbeddingBagCollection(tables=configs, device=torch.device(device))


def init_rows(rows: Tensor, *, table: str, first_row: int, vector: int, std: float, seed: int) -> None:
    """Fills `rows` [R, D], which start at `first_row` of a table: `vector` columns of N(0, std), then zeros.

    Drawn in chunks of 65,536 rows, each from its own generator: a row's start is the same however it is sharded.
    """
    rows.zero_()
    end_row = first_row + rows.shape[0]
    for chunk in range(first_row // _CHUNK_ROWS, -(-end_row // _CHUNK_ROWS)):
        start = chunk * _CHUNK_ROWS
        chunk_seed = seed_of(seed, table, chunk)
        drawn = torch.randn(_CHUNK_ROWS, vector, generator=torch.Generator().manual_seed(chunk_seed)) * std
        low, high = max(start, first_row), min(start + _CHUNK_ROWS, end_row)
        rows[low - first_row : high - first_row, :vector] = drawn[low - start : high - start].to(rows.device)
