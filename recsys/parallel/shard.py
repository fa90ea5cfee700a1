"""Shards a network's tables over the ranks and wraps its dense part, all from outside."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, ShardingType
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.types import ShardedTensor
from torchrec.optim import RowWiseAdagrad, apply_optimizer_in_backward

from recsys.experiment import Embedding
from recsys.network import Network, init_rows
from recsys.parallel.world import World

__all__ = ["DistributedModelParallel", "shard"]

_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}
# Data parallel is left out: its tables would not get the fused optimizer.
_SHARDINGS = {"auto": ["table_wise", "row_wise"], "table_wise": ["table_wise"], "row_wise": ["row_wise"]}


class _Sharder(EmbeddingBagCollectionSharder):  # type: ignore[misc]
    """torchrec offers row-wise sharding on CUDA alone, though its CPU kernels have it."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [*super().sharding_types(compute_device_type), ShardingType.ROW_WISE.value]


def shard(network: Network, embedding: Embedding, *, world: World, seed: int) -> DistributedModelParallel:
    """The network over all ranks: tables sharded, with their optimizer in the backward pass, and rows initialised."""
    tables = network.tables
    settings: dict[str, float] = {"lr": embedding.learning_rate}
    if embedding.optimizer != "sgd":
        settings["eps"] = embedding.eps
    apply_optimizer_in_backward(_OPTIMIZERS[embedding.optimizer], tables.parameters(), settings)
    sharder = _Sharder()
    constraints = {
        config.name: ParameterConstraints(
            sharding_types=_SHARDINGS[embedding.sharding], compute_kernels=[EmbeddingComputeKernel.FUSED.value]
        )
        for config in tables.embedding_bag_configs()
    }
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=world.size, compute_device=world.device.type),
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(0.15),
    )
    plan = planner.collective_plan(network, [sharder], dist.GroupMember.WORLD)
    network.head.to(world.device)
    network.columns = network.columns.to(world.device)
    model = DistributedModelParallel(network, device=world.device, plan=plan, sharders=[sharder])
    _fill(model, network, std=embedding.init_std, seed=seed)
    return model


def _fill(model: nn.Module, network: Network, *, std: float, seed: int) -> None:
    layout = network.layout
    vectors = {f.table: layout.dim if at < layout.vectors else 0 for at, f in enumerate(layout.features)}
    state: dict[str, Any] = model.state_dict()
    for table, vector in vectors.items():
        weight: ShardedTensor = state[f"tables.embedding_bags.{table}.weight"]
        for part in weight.local_shards():
            first_row = part.metadata.shard_offsets[0]
            init_rows(part.tensor.detach(), table=table, first_row=first_row, vector=vector, std=std, seed=seed)
