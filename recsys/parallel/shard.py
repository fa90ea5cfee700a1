"""Shards a network's tables over the ranks and wraps its dense part, all from outside."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.batched_embedding_kernel import BatchedDenseEmbeddingBag
from torchrec.distributed.embedding_types import ShardedEmbeddingTable
from torchrec.distributed.planner.constants import BATCH_SIZE
from torchrec.distributed.types import Shard, ShardedTensor, ShardingPlan
from torchrec.optim import RowWiseAdagrad, apply_optimizer_in_backward

from etl.faults import Fault
from etl.schema import Schema
from recsys.experiment import Embedding, Experiment
from recsys.network import Network, init_rows
from recsys.parallel.cached import Cached, is_cached
from recsys.parallel.kernels import fits
from recsys.parallel.plan import make_plan, place_tables
from recsys.parallel.replicated import ReplicatedRows
from recsys.parallel.row_rules import needs_own_rows
from recsys.parallel.rows import RowOptimizer, hold
from recsys.parallel.sharders import hardware_here, resized, sharder_of
from recsys.parallel.world import World

__all__ = ["Sharded", "ShardingPlan", "shard", "training_plan"]

_FILL_ROWS = 1 << 17  # drawn at once
_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}


@dataclass(frozen=True)
class Sharded:
    """The network over all ranks; `rows` moves its tables where FBGEMM's fused optimizers do not, `replicated` those
    that each rank has a copy of; `cached` are those behind a cache."""

    model: DistributedModelParallel
    rows: RowOptimizer | None
    replicated: tuple[ReplicatedRows, ...] = ()
    cached: tuple[Cached, ...] = ()

    def begin_step(self, step: int) -> None:
        """Says which step comes, counted from 1."""
        for own in self._own():
            own.step = step

    def start_states(self) -> None:
        """The states of own optimizers where training begins, from the rows as they are."""
        for group in (*(self.rows.groups if self.rows else ()), *self.replicated):
            group.start()

    def scale_rate(self, factor: float) -> None:
        """Sets the tables' learning rates to `factor` times those of the experiment."""
        for own in self._own():
            own.rate = factor
        for group in self.model.fused_optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * factor
        self.model.fused_optimizer.step()  # hands the rate on: the update itself is in the backward pass

    def rows_were_loaded(self) -> None:
        """Says that what lies behind caches was written anew."""
        for cached in self.cached:
            cached.forget()

    def replicated_states(self, which: int) -> dict[str, Tensor]:
        """The first (0) or second (1) optimizer state of each data_parallel table that has it, of the shape that a
        sharded table's has."""
        copies = (copy for own in self.replicated for copy in own.copies if len(copy.states) > which)
        return {copy.name: state if (state := copy.states[which]).shape[1] > 1 else state[:, 0] for copy in copies}

    def _own(self) -> tuple[RowOptimizer | ReplicatedRows, ...]:
        return (*((self.rows,) if self.rows else ()), *self.replicated)


def training_plan(experiment: Experiment, schema: Schema, *, world: World) -> ShardingPlan:
    """Rank 0's plan for the processes that run, on all of them.

    Raises:
        Fault: it does not fit; on every rank.
    """
    return _agreed(lambda: make_plan(experiment, schema, hardware=hardware_here(world)).sharding, world=world)


def shard(
    network: Network, embedding: Embedding, *, world: World, seed: int, plan: ShardingPlan | None = None
) -> Sharded:
    """The network over all ranks: tables sharded, with their optimizer in the backward pass, and rows initialised.

    Without a plan one is made for the tables alone.

    Raises:
        Fault: the tables do not fit; on every rank.
    """
    network.tables = tables = resized(network.tables, embedding)
    sharder = sharder_of(embedding, world.device.type)
    plan = plan or _agreed(
        lambda: place_tables(network, embedding, hardware=hardware_here(world), batch_size=BATCH_SIZE), world=world
    )
    _choose_optimizers(tables, embedding)
    network.head.to(world.device)
    network.columns = network.columns.to(world.device)
    alone = world.size == 1  # nobody to average gradients with
    model = DistributedModelParallel(
        network, device=world.device, plan=plan, sharders=[sharder], init_data_parallel=not alone
    )
    vectors = network.layout.vector_sizes()
    _fill(model, vectors, std=embedding.init_std, seed=seed)
    return _with_optimizers(model, embedding, vectors=vectors)


def _choose_optimizers(tables: EmbeddingBagCollection, embedding: Embedding) -> None:
    """FBGEMM's for each table; a frozen one gets that without states, which puts it into modules of its own."""
    own = needs_own_rows(embedding)
    settings: dict[str, float] = {"lr": embedding.learning_rate}
    if own or embedding.optimizer != "sgd":
        settings["eps"] = embedding.eps
    kind = "adagrad" if own else embedding.optimizer  # one state a weight, for whatever optimizer moves it
    for name, bag in tables.embedding_bags.items():
        frozen = embedding.of(name).frozen
        chosen = (torch.optim.SGD, {"lr": 0.0}) if frozen else (_OPTIMIZERS[kind], settings)
        apply_optimizer_in_backward(chosen[0], bag.parameters(), chosen[1])


def _agreed(make: Callable[[], ShardingPlan], *, world: World) -> ShardingPlan:
    """What rank 0 makes, on all ranks; every rank has to call. Raises its Fault there, so that none waits."""
    found: list[Any] = [None]
    if world.rank == 0:
        try:
            found = [make()]
        except Fault as fault:
            found = [(fault.place, fault.got, fault.wanted, fault.remedy)]
    dist.broadcast_object_list(found, device=world.device)
    if isinstance(found[0], tuple):
        place, got, wanted, remedy = found[0]
        raise Fault(place, got=got, wanted=wanted, remedy=remedy)
    plan: ShardingPlan = found[0]
    return plan


def _with_optimizers(model: DistributedModelParallel, embedding: Embedding, *, vectors: dict[str, int]) -> Sharded:
    """Attaches what moves rows beside FBGEMM's fused optimizers, to tables that are filled by now."""
    rows, own = RowOptimizer(embedding), needs_own_rows(embedding)
    replicated = []
    for kernel in _kernels(model):
        shards = kernel.config.embedding_tables
        if isinstance(kernel, BatchedDenseEmbeddingBag):
            replicated.append(ReplicatedRows(kernel, vectors, embedding=embedding))
        elif any(embedding.of(table.name).frozen for table in shards):
            hold(kernel.emb_module)
        elif own or fits(kernel.emb_module):
            rows.attach(kernel.emb_module, [_vector_of(table, vectors[table.name]) for table in shards])
        else:
            _start_accumulators(kernel.emb_module, embedding)
    cached = tuple(Cached(kernel.emb_module) for kernel in _kernels(model) if is_cached(kernel.emb_module))
    return Sharded(model, rows if rows.groups else None, tuple(replicated), cached)


def _kernels(model: nn.Module) -> Iterator[Any]:
    """torchrec's wrappers of FBGEMM's modules, which lie in lists that `modules()` does not see."""
    for module in model.modules():
        for lookup in getattr(module, "_lookups", []):
            yield from getattr(lookup, "_emb_modules", [])


def _vector_of(table: ShardedEmbeddingTable, vector: int) -> int:
    """How many columns of a shard are a vector, of those of the whole row."""
    first = table.local_metadata.shard_offsets[1] if table.local_metadata else 0
    return int(max(0, min(vector - first, table.local_cols)))


def _start_accumulators(fused: SplitTableBatchedEmbeddingBagsCodegen, embedding: Embedding) -> None:
    """Adagrad's sums of squares begin at `accumulator_start`."""
    if embedding.accumulator_start and embedding.optimizer != "sgd":
        for states in fused.split_optimizer_states():
            states[0].fill_(embedding.accumulator_start)


def _fill(model: nn.Module, vectors: Mapping[str, int], *, std: float, seed: int) -> None:
    for table, part in _own_shards(model, vectors):
        (first_row, column), (rows, width) = part.metadata.shard_offsets, part.metadata.shard_sizes
        own, vector = part.tensor.detach(), vectors[table]
        for low in range(0, rows, _FILL_ROWS):
            block = own[low : low + _FILL_ROWS]
            drawn = block.new_empty(len(block), max(column + width, vector), dtype=torch.float32)
            init_rows(drawn, table=table, first_row=first_row + low, vector=vector, std=std, seed=seed)
            block.copy_(drawn[:, column : column + width])


def _own_shards(model: nn.Module, tables: Iterable[str]) -> Iterator[tuple[str, Shard]]:
    """What this rank holds of each table's weights."""
    state: dict[str, Any] = model.state_dict()
    for table in tables:
        weight: ShardedTensor | Tensor = state[f"tables.embedding_bags.{table}.weight"]
        if not isinstance(weight, ShardedTensor):
            yield table, Shard.from_tensor_and_offsets(weight, [0, 0], dist.get_rank())
            continue
        for part in weight.local_shards():
            yield table, part
