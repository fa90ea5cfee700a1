"""Which table goes where: TorchRec's planner on a topology, real or only described, within what the experiment asks."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, ShardingType
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError, Stats
from torchrec.distributed.types import CacheParams, ShardingPlan
from torchrec.modules.embedding_configs import DataType
from torchrec.optim import RowWiseAdagrad

from etl.faults import Fault
from recsys.experiment import Embedding
from recsys.host_memory import host_memory_bytes
from recsys.optim import state_count
from recsys.parallel.row_rules import needs_own_rows
from recsys.parallel.tables import Tables
from recsys.parallel.world import World
from recsys.placement import LANE, Resolved

_GB = 1e9 / 1000  # bytes/ms, the planner's unit, of one GB/s
HEADROOM = 0.1  # of a memory, for what fragments and what nobody counted
_AUTO_COLUMNS = 128  # narrower rows are not worth cutting across: TorchRec's own bound


@dataclass(frozen=True)
class Hardware:
    """What the planner has to know: equal hosts with equal ranks; bytes of a GPU's memory and of a host's.

    Bandwidths are those of H100 SXM nodes (HBM3 3.35 TB/s, NVLink 450 GB/s, PCIe 5 64 GB/s, 400 Gb/s a GPU), or of
    server CPUs whose ranks talk through gloo.
    """

    ranks: int
    hosts: int
    device: str
    hbm_bytes: int
    ddr_bytes: int

    @property
    def ranks_per_host(self) -> int:
        """Ranks of one host."""
        return self.ranks // self.hosts

    def topology(self, *, reserved_bytes: int) -> Topology:
        """For the planner; each rank keeps `reserved_bytes` of its own memory for what is not a table."""
        cuda = self.device == "cuda"
        ddr_bytes = self.ddr_bytes // self.ranks_per_host
        own_bytes = int((self.hbm_bytes if cuda else ddr_bytes) * (1 - HEADROOM)) - reserved_bytes
        return Topology(
            world_size=self.ranks,
            local_world_size=self.ranks_per_host,
            compute_device=self.device,
            hbm_cap=max(own_bytes, 0) if cuda else 0,
            ddr_cap=int(ddr_bytes * (1 - HEADROOM)) if cuda else max(own_bytes, 0),
            hbm_mem_bw=3350 * _GB,
            ddr_mem_bw=(200 if cuda else 20) * _GB,
            hbm_to_ddr_mem_bw=64 * _GB,
            intra_host_bw=(450 if cuda else 2) * _GB,
            inter_host_bw=(50 if cuda else 1) * _GB,
        )


def hardware_here(world: World) -> Hardware:
    """That of the running processes, as this rank sees it."""
    cuda = world.device.type == "cuda"
    hbm_bytes = torch.cuda.get_device_properties(world.device).total_memory if cuda else 0
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    hosts = 1 if world.size % local else world.size // local  # as torchrec, which has no uneven hosts
    return Hardware(world.size, hosts, world.device.type, hbm_bytes, host_memory_bytes())


class Sharder(EmbeddingBagCollectionSharder):  # type: ignore[misc]
    """All sharding types on every device: torchrec offers those that cut rows on CUDA alone, though its CPU kernels
    have them."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return sorted(kind.value for kind in ShardingType)

    def shard(self, module: EmbeddingBagCollection, *rest: Any) -> Tables:
        """`rest`: the tables' parts of the plan, the processes, the device and the module's name."""
        params, env, device, *name = rest
        codecs = self.qcomm_codecs_registry
        tables = Tables(module, params, env, self.fused_params, device, codecs, *name)
        tables.leave_ddp()
        tables.exchange_over_gloo()
        return tables


def sharder_of(embedding: Embedding, device: str) -> Sharder:
    """The sharder, with codecs where less than fp32 is sent."""
    precisions = {"fp32": CommType.FP32, "fp16": CommType.FP16, "bf16": CommType.BF16}
    config = QCommsConfig(
        forward_precision=precisions[embedding.forward_comm], backward_precision=precisions[embedding.backward_comm]
    )
    return Sharder(qcomm_codecs_registry=get_qcomm_codecs_registry(config, device=torch.device(device)))


class _Enumerator(EmbeddingEnumerator):  # type: ignore[misc]
    """Options in a fixed order: torchrec's come out of sets, so that ties would fall otherwise at each start."""

    def _filter_sharding_types(self, *arguments: Any) -> list[str]:
        return sorted(super()._filter_sharding_types(*arguments))

    def _filter_compute_kernels(self, *arguments: Any) -> list[str]:
        return sorted(super()._filter_compute_kernels(*arguments))


class Planner:
    """TorchRec's planner. Tables whose placement is left to it spill into host memory only where not all of them fit
    the memory that ranks compute in."""

    def __init__(self, ways: Sequence[EmbeddingShardingPlanner]) -> None:
        """`ways` to plan, from the one that is tried first."""
        self._ways = ways

    def plan(self, network: nn.Module, sharder: Sharder) -> ShardingPlan:
        """The plan of the first way that has one. Raises PlannerError where none has."""
        for way in self._ways[:-1]:
            with suppress(PlannerError):
                return _with_prefetch(way.plan(network, [sharder]))
        return _with_prefetch(self._ways[-1].plan(network, [sharder]))


def planner_of(
    tables: EmbeddingBagCollection,
    embedding: Embedding,
    *,
    hardware: Hardware,
    batch_size: int,
    reserved_bytes: int = 0,
    stats: Sequence[Stats] = (),
) -> Planner:
    """TorchRec's planner within the experiment's constraints; `batch_size` is that of a rank.

    Raises:
        Fault: a placement that the optimizer can't work in.
    """
    configs, topology = tables.embedding_bag_configs(), hardware.topology(reserved_bytes=reserved_bytes)
    left = any(embedding.of(config.name).placement == "auto" for config in configs)
    ways = []
    for spill in (False, True) if left and hardware.device == "cuda" else (False,):
        constraints = {c.name: _constraint(c, embedding, hardware=hardware, spill=spill) for c in configs}
        way = EmbeddingShardingPlanner(
            topology=topology,
            batch_size=batch_size,
            constraints=constraints,
            enumerator=_Enumerator(topology, batch_size=batch_size, constraints=constraints),
            storage_reservation=FixedPercentageStorageReservation(0.0),
            stats=list(stats),
        )
        ways.append(way)
    return Planner(ways)


def _with_prefetch(plan: ShardingPlan) -> ShardingPlan:
    """Rows may come into a cache before the step that comes first has moved them. Not said before tables are placed:
    torchrec's planner takes such a cache for as fast as a GPU's own memory."""
    for tables in plan.plan.values():
        for table in tables.values():
            if table.cache_params:
                table.cache_params.prefetch_pipeline = True
    return plan


@contextmanager
def states_shown(tables: EmbeddingBagCollection, embedding: Embedding) -> Iterator[None]:
    """Lets the planner count the optimizer's states, also those of our own row optimizers."""
    count = max(state_count(embedding), state_count(embedding.linear or embedding))
    kinds: list[type] = [torch.optim.SGD, torch.optim.Adagrad, torch.optim.Adam]
    kind = kinds[max(count, 1)] if needs_own_rows(embedding) else kinds[count]
    if not needs_own_rows(embedding) and embedding.rowwise:
        kind = RowWiseAdagrad
    for name, bag in tables.embedding_bags.items():
        bag.weight._optimizer_classes = [torch.optim.SGD if embedding.of(name).frozen else kind]
    try:
        yield
    finally:
        for parameter in tables.parameters():
            del parameter._optimizer_classes


def _constraint(
    config: EmbeddingBagConfig, embedding: Embedding, *, hardware: Hardware, spill: bool
) -> ParameterConstraints:
    own, width = embedding.of(config.name), config.embedding_dim
    return ParameterConstraints(
        sharding_types=_types(own, embedding, config=config, hardware=hardware),
        compute_kernels=_kernels(own, embedding, table=config.name, device=hardware.device, spill=spill),
        min_partition=own.column_width or _column_width(own, width=width, hardware=hardware),
        pooling_factors=[1.0] * len(config.feature_names),  # a slot has one id or none
        cache_params=CacheParams(load_factor=own.cache_share) if hardware.device == "cuda" else None,
    )


def _types(own: Resolved, embedding: Embedding, *, config: EmbeddingBagConfig, hardware: Hardware) -> list[str]:
    """What may be; a cut that would leave a rank without rows gives way: FBGEMM's fused kernels crash on 0 rows."""
    if hardware.ranks == 1 and own.sharding != "data_parallel":
        return ["table_wise"]  # a lone rank has nothing to cut and nothing to send
    wide = config.embedding_dim >= _AUTO_COLUMNS and not embedding.rowwise
    hosts = ["table_row_wise"] if hardware.hosts > 1 else []
    asked = [own.sharding] if own.sharding != "auto" else ["row_wise", *(["column_wise"] if wide else []), *hosts]
    parts = {"row_wise": hardware.ranks} | dict.fromkeys(("table_row_wise", "grid_shard"), hardware.ranks_per_host)
    whole = [kind for kind in asked if not _leaves_one_empty(config.num_embeddings, parts.get(kind, 1))]
    return whole if whole and own.sharding != "auto" else ["table_wise", *whole]


def _leaves_one_empty(rows: int, parts: int) -> bool:
    """Whether rows in parts of equal size, rounded up, leave the last part none."""
    return -(-rows // parts) * (parts - 1) >= rows


def _kernels(own: Resolved, embedding: Embedding, *, table: str, device: str, spill: bool) -> list[str]:
    """`spill`: a table whose placement is left open may lie in host memory."""
    kernels = EmbeddingComputeKernel
    if own.sharding == "data_parallel":
        return [kernels.DENSE.value]
    if own.placement == "uvm_caching" and needs_own_rows(embedding):
        got = f"placement 'uvm_caching' and an optimizer that FBGEMM has not ({embedding.optimizer})"
        remedy = "take placement 'uvm', or sgd, adagrad or rowwise_adagrad without L2 and without 'linear'"
        raise Fault(f"embedding, table '{table}'", got=got, wanted="an optimizer that knows the cache", remedy=remedy)
    if device == "cpu":
        return [kernels.FUSED.value]
    spilled = kernels.FUSED_UVM if needs_own_rows(embedding) else kernels.FUSED_UVM_CACHING
    chosen = {
        "auto": [kernels.FUSED, spilled] if spill else [kernels.FUSED],
        "hbm": [kernels.FUSED],
        "uvm": [kernels.FUSED_UVM],
        "uvm_caching": [kernels.FUSED_UVM_CACHING],
    }
    return [kernel.value for kernel in chosen[own.placement]]


def _column_width(own: Resolved, *, width: int, hardware: Hardware) -> int | None:
    """Floats of a column shard: the widest cut into equal shards of whole lanes that gives each of them one."""
    takers = {
        "column_wise": hardware.ranks,
        "table_column_wise": hardware.ranks_per_host,
        "grid_shard": hardware.hosts,
    }.get(own.sharding)
    if takers is None:
        return None
    cuts = [cut for cut in range(LANE, width + 1, LANE) if width % cut == 0]
    return max((cut for cut in cuts if cut * takers <= width), default=cuts[0])


def resized(tables: EmbeddingBagCollection, embedding: Embedding) -> EmbeddingBagCollection:
    """The tables in the precisions that the experiment asks for, without their rows."""
    configs = tables.embedding_bag_configs()
    if all(embedding.of(config.name).precision == "fp32" for config in configs):
        return tables
    kinds = {"fp32": DataType.FP32, "fp16": DataType.FP16}
    chosen = [replace(config, data_type=kinds[embedding.of(config.name).precision]) for config in configs]
    return EmbeddingBagCollection(tables=chosen, device=torch.device("meta"))
