"""The network: embedding tables and a head, single-device; `recsys/parallel` shards it from outside.

All of a feature sits in one table row: [vector K | first-order weight | 3 unused zeros], so that one memory access
reads both and the width stays divisible by 4, as FBGEMM needs. A row without vector is [weight | 3 zeros], one without
first-order weight is the vector.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor, PoolingType

from etl.artifact import seed_of
from etl.schema import IdFeature, Schema
from recsys.experiment import Experiment
from recsys.models.head import Head, Inputs, ModelConfig, Sizes
from recsys.models.layers import init_linear

_LANE = 4
_CHUNK_ROWS = 65_536


@dataclass(frozen=True)
class Layout:
    """Which id features a model reads, in the order in which their rows stand side by side: those with a vector first.

    `columns` holds each one's place in the schema, `vectors` how many of them have a vector, `dim` is K.
    """

    features: tuple[IdFeature, ...]
    columns: tuple[int, ...]
    vectors: int
    dim: int
    linear: bool

    @classmethod
    def of(cls, schema: Schema, config: ModelConfig, *, dim: int) -> "Layout":
        """A model without vectors reads all features as `linear_only`; one without first-order weights skips those."""
        places = range(len(schema.features))
        full = [at for at in places if config.vectors and not schema.features[at].linear_only]
        weights = [at for at in places if config.linear and at not in full]
        columns = (*full, *weights)
        return cls(tuple(schema.features[at] for at in columns), columns, len(full), dim, config.linear)

    @property
    def width(self) -> int:
        """Floats of a row with a vector; other rows have 4."""
        return self.dim + (_LANE if self.linear else 0)

    def widths(self) -> dict[str, int]:
        """Floats of one row of each table."""
        return {f.table: self.width if at < self.vectors else _LANE for at, f in enumerate(self.features)}

    def inputs(self, pooled_BD: Tensor, dense_BN: Tensor) -> Inputs:
        """Rows side by side in this layout's order, cut into what a head reads; no copies but of the weights."""
        size, end = pooled_BD.shape[0], self.vectors * self.width
        full_BFD = pooled_BD[:, :end].view(size, self.vectors, self.width)
        emb_BFK, linear_BL = full_BFD[:, :, : self.dim], pooled_BD[:, end::_LANE]
        if self.linear and self.vectors:
            linear_BL = torch.cat([full_BFD[:, :, self.dim], linear_BL], dim=1)
        return Inputs(emb_BFK, linear_BL, dense_BN)


class Network(nn.Module):
    """Tables and head. `forward(ids_BF, dense_BN) -> logits_BT`, ids in the schema's order."""

    columns: Tensor

    def __init__(self, layout: Layout, *, tables: EmbeddingBagCollection, head: Head) -> None:
        super().__init__()
        self.layout, self.tables, self.head = layout, tables, head
        self._names = [feature.name for feature in layout.features]
        self.register_buffer("columns", torch.tensor(layout.columns, dtype=torch.int64), persistent=False)

    def forward(self, ids_BF: Tensor, dense_BN: Tensor) -> Tensor:
        pooled = self.tables(self.lookups(ids_BF))
        logits_BT: Tensor = self.head(self.layout.inputs(self._in_order(pooled), dense_BN))
        return logits_BT

    def lookups(self, ids_BF: Tensor) -> KeyedJaggedTensor:
        """One id a feature and row, feature after feature."""
        values = ids_BF.index_select(1, self.columns).t().reshape(-1)
        return KeyedJaggedTensor(self._names, values, lengths=torch.ones_like(values, dtype=torch.int32))

    def _in_order(self, pooled: KeyedTensor) -> Tensor:
        """A sharded lookup answers in the order of its plan."""
        if pooled.keys() == self._names:
            values_BD: Tensor = pooled.values()
            return values_BD
        in_order_BD: Tensor = KeyedTensor.regroup([pooled], [self._names])[0]
        return in_order_BD


def build_network(experiment: Experiment, schema: Schema, *, table_device: str) -> Network:
    """The network with its head initialised from the seed; rows of tables on "meta" are to be filled by `init_rows`."""
    layout = Layout.of(schema, experiment.model, dim=experiment.embedding.dim)
    sizes = Sizes(layout.vectors, layout.dim, len(schema.dense), len(schema.tasks))
    head = experiment.model.build(sizes)
    init_linear(head, torch.Generator().manual_seed(experiment.seed))
    tables = [
        EmbeddingBagConfig(
            name=name,
            num_embeddings=schema.rows(name),
            embedding_dim=width,
            feature_names=[feature.name for feature in layout.features if feature.table == name],
            pooling=PoolingType.SUM,
        )
        for name, width in layout.widths().items()
    ]
    collection = EmbeddingBagCollection(tables=tables, device=torch.device(table_device))
    return Network(layout, tables=collection, head=head)


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
