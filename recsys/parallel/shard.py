"""Shards a network's tables over the ranks and wraps its dense part, all from outside."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, ShardingType
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.types import Shard, ShardedTensor
from torchrec.optim import RowWiseAdagrad, apply_optimizer_in_backward

from recsys.experiment import Embedding
from recsys.network import Network, init_rows
from recsys.parallel.rows import RowOptimizer, needs_own_rows
from recsys.parallel.world import World

__all__ = ["Sharded", "shard"]

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


@dataclass(frozen=True)
class Sharded:
    """The network over all ranks; `rows` moves its tables where FBGEMM's fused optimizers do not."""

    model: DistributedModelParallel
    rows: RowOptimizer | None

    def begin_step(self, step: int) -> None:
        """Says which step comes, counted from 1."""
        if self.rows:
            self.rows.step = step

    def set_rows(self, tables: Mapping[str, Tensor]) -> None:
        """Overwrites this rank's rows of the tables [R, W] with given ones; optimizers begin anew from them."""
        for name, part in _own_shards(self.model, tables):
            (first, column), (rows, columns) = part.metadata.shard_offsets, part.metadata.shard_sizes
            part.tensor.detach().copy_(tables[name][first : first + rows, column : column + columns])
        for group in self.rows.groups if self.rows else ():
            group.start()

    def scale_rate(self, factor: float) -> None:
        """Sets the tables' learning rates to `factor` times those of the experiment."""
        if self.rows:
            self.rows.rate = factor
        for group in self.model.fused_optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * factor
        self.model.fused_optimizer.step()  # hands the rate on: the update itself is in the backward pass


def shard(network: Network, embedding: Embedding, *, world: World, seed: int) -> Sharded:
    """The network over all ranks: tables sharded, with their optimizer in the backward pass, and rows initialised."""
    tables, own = network.tables, needs_own_rows(embedding)
    settings: dict[str, float] = {"lr": embedding.learning_rate}
    if own or embedding.optimizer != "sgd":
        settings["eps"] = embedding.eps
    kind = "adagrad" if own else embedding.optimizer  # one state a weight, for whatever optimizer moves it
    apply_optimizer_in_backward(_OPTIMIZERS[kind], tables.parameters(), settings)
    sharder = _Sharder()
    sharding = embedding.sharding if world.size > 1 else "table_wise"  # a lone rank has nothing to send
    constraints = {
        config.name: ParameterConstraints(
            sharding_types=_SHARDINGS[sharding], compute_kernels=[EmbeddingComputeKernel.FUSED.value]
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
    model = DistributedModelParallel(
        network, device=world.device, plan=plan, sharders=[sharder], init_data_parallel=world.size > 1
    )
    _fill(model, network, std=embedding.init_std, seed=seed)
    fused = list(_fused_modules(model))
    if not own:
        _start_accumulators(fused, embedding)
        return Sharded(model, None)
    rows = RowOptimizer(embedding, layout=network.layout)
    for module in fused:
        rows.attach(module)
    return Sharded(model, rows)


def _fused_modules(model: nn.Module) -> Iterator[SplitTableBatchedEmbeddingBagsCodegen]:
    """FBGEMM's modules, which torchrec keeps in lists that `modules()` does not see."""
    for module in model.modules():
        for lookup in getattr(module, "_lookups", []):
            for kernel in getattr(lookup, "_emb_modules", []):
                yield kernel.emb_module


def _start_accumulators(fused: list[SplitTableBatchedEmbeddingBagsCodegen], embedding: Embedding) -> None:
    """Adagrad's sums of squares begin at `accumulator_start`."""
    if embedding.accumulator_start and embedding.optimizer != "sgd":
        for module in fused:
            for states in module.split_optimizer_states():
                states[0].fill_(embedding.accumulator_start)


def _fill(model: nn.Module, network: Network, *, std: float, seed: int) -> None:
    layout = network.layout
    vectors = {table: layout.sizes.dim if at < layout.vectors else 0 for at, (_, table) in enumerate(layout.slots)}
    for table, part in _own_shards(model, vectors):
        first_row, vector = part.metadata.shard_offsets[0], vectors[table]
        init_rows(part.tensor.detach(), table=table, first_row=first_row, vector=vector, std=std, seed=seed)


def _own_shards(model: nn.Module, tables: Iterable[str]) -> Iterator[tuple[str, Shard]]:
    """What this rank holds of each table's weights."""
    state: dict[str, Any] = model.state_dict()
    for table in tables:
        weight: ShardedTensor = state[f"tables.embedding_bags.{table}.weight"]
        for part in weight.local_shards():
            yield table, part
