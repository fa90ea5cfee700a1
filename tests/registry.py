"""A schema with every kind of feature, and each model of the registry on it, every weight random."""

from typing import Any

import torch
from torch import Tensor

from etl.schema import DenseFeature, IdFeature, Schema, Table, TaskColumn
from recsys.experiment import Embedding
from recsys.layout import Layout
from recsys.models import MODELS
from recsys.models.head import ModelConfig
from recsys.models.layers import init_head
from recsys.network import Network, tables_of

ROWS = {"user": 9, "item": 12, "tags": 7, "price": 2, "pair": 11}
SETTINGS: dict[str, dict[str, Any]] = {
    "din": {"attention": [{"query": ["item"], "keys": ["history"]}]},
    "bst": {"attention": [{"query": ["item"], "keys": ["history"]}]},
}
"""What a model can't do without on this schema."""


def id_feature(name: str, type_: str = "categorical", **rest: Any) -> IdFeature:
    return IdFeature(**{"name": name, "type": type_, "table": name, "linear_only": False} | rest)


def rich_schema(*, dense: int = 2, tasks: tuple[str, ...] = ("click", "conversion")) -> Schema:
    """Plain ids, a weighted bag, a number as a field, a history on the item's table and a cross with a weight alone."""
    features = (
        id_feature("user"),
        id_feature("pair", "cross", linear_only=True),
        id_feature("tags", "bag", slots=3, weighted=True, combiner="mean", dtype="list<int64>"),
        id_feature("price", "field", weighted=True),
        id_feature("item"),
        id_feature("history", "sequence", table="item", slots=4, combiner="mean", dtype="list<int64>"),
    )
    return schema_of(features, dense=dense, tasks=tasks)


def schema_of(features: tuple[IdFeature, ...], *, dense: int, tasks: tuple[str, ...]) -> Schema:
    return Schema(
        features=features,
        dense=tuple(DenseFeature(name=f"x{at}") for at in range(dense)),
        tables=tuple(Table(name=name, rows=ROWS[name]) for name in dict.fromkeys(f.table for f in features)),
        tasks=tuple(TaskColumn(name=name, positive_rate=0.5) for name in tasks),
    )


def config_of(kind: str, **settings: Any) -> ModelConfig:
    """The model's own settings, and those that this schema needs."""
    return MODELS[kind].model_validate({"kind": kind} | SETTINGS.get(kind, {}) | settings)


def network_of(config: ModelConfig, schema: Schema, *, dim: int = 4, std: float = 0.5) -> Network:
    """Rows and every other parameter are random: a zero would hide a wrong lookup."""
    layout = Layout.of(schema, config, dim=dim)
    generator = torch.Generator().manual_seed(7)
    head = config.build(layout.sizes)
    init_head(head, generator)
    tables = tables_of(layout, schema, device="cpu")
    network = Network(layout, tables=tables, head=head, embedding=Embedding(dim=dim))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)
    return network.eval()


def random_rows(schema: Schema, size: int, *, seed: int = 8) -> tuple[Tensor, Tensor]:
    """ids [B, S] with bags and histories of any length, also empty, and floats [B, N]."""
    generator = torch.Generator().manual_seed(seed)
    columns = []
    for feature in schema.features:
        ids_BL = torch.randint(0, schema.rows(feature.table), (size, feature.slots), generator=generator)
        if feature.dtype == "list<int64>":
            lengths_B1 = torch.randint(0, feature.slots + 1, (size, 1), generator=generator)
            ids_BL = torch.where(torch.arange(feature.slots) < lengths_B1, ids_BL, -1)
        columns.append(ids_BL)
    return torch.cat(columns, dim=1), torch.rand(size, len(schema.float_names), generator=generator) + 0.1
