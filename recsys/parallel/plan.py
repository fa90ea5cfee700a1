"""A plan for ranks that need not be there: who holds what, how much memory that takes, what travels in a step.

TorchRec's planner chooses; the bytes are counted here, from the shards it made and from what a step keeps beside them.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchrec import EmbeddingBagConfig
from torchrec.distributed.planner.types import PlannerError, Stats
from torchrec.distributed.types import ShardingPlan

from etl.faults import Fault
from etl.schema import Schema
from recsys.experiment import Embedding, Experiment
from recsys.forecast import GIB, Dense, dense_bytes
from recsys.network import Network, build_network
from recsys.optim import state_count
from recsys.parallel.refusals import largest, spilling_placement, too_large
from recsys.parallel.row_rules import needs_own_rows
from recsys.parallel.sharders import HEADROOM, Hardware, planner_of, resized, sharder_of, states_shown

_ID_BYTES = 12  # an id, and its length of 4
_ROW_CUTS = ("row_wise", "table_row_wise", "grid_shard")
_SENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class ShardPlan:
    """What one rank holds of one table, in bytes and in the planner's ms a step."""

    table: str
    sharding: str
    memory: str
    rank: int
    first_row: int
    first_column: int
    rows: int
    columns: int
    weight_bytes: int
    state_bytes: int
    ms: float


@dataclass(frozen=True)
class RankPlan:
    """One rank: bytes of its GPU's memory and of its share of the host's, by use; sent bytes and ms of a step."""

    rank: int
    hbm: Mapping[str, int]
    ddr: Mapping[str, int]
    sent_bytes: int
    ms: float


@dataclass(frozen=True)
class Plan:
    """A whole plan; `hbm_limit` and `ddr_limit` are what a rank may use, in bytes, headroom taken off.

    `batch_size` are the rows of a rank in one step; `sharding` is the plan as torchrec carries it out.
    """

    hardware: Hardware
    batch_size: int
    tables: Mapping[str, int]
    shards: tuple[ShardPlan, ...]
    ranks: tuple[RankPlan, ...]
    hbm_limit: int
    ddr_limit: int
    sharding: ShardingPlan


class _Keep(Stats):  # type: ignore[misc]
    """Takes the shards with their ranks and estimates, which the plan itself does not carry."""

    def __init__(self) -> None:
        self.options: list[Any] = []

    def log(self, *arguments: Any, **named: Any) -> None:
        self.options = list(named["best_plan"])


def make_plan(experiment: Experiment, schema: Schema, *, hardware: Hardware) -> Plan:
    """The plan that training would make on this hardware.

    Raises:
        Fault: it does not fit; the largest tables and what would help are named.
    """
    embedding, batch_size = experiment.embedding, experiment.train.rank_rows
    network = build_network(experiment, schema, table_device="meta")
    dense = dense_bytes(experiment, network, schema=schema)
    tables = network.tables = resized(network.tables, embedding)
    configs = {config.name: config for config in tables.embedding_bag_configs()}
    reserved, kept = dense.reserved(hardware.device), _Keep()
    sharding = place_tables(
        network, embedding, hardware=hardware, batch_size=batch_size, reserved_bytes=reserved, stats=[kept]
    )
    shards = tuple(_shards(kept.options, configs, embedding=embedding))
    ranks = tuple(_ranks(shards, configs, network=network, experiment=experiment, hardware=hardware, dense=dense))
    hbm_limit = int(hardware.hbm_bytes * (1 - HEADROOM))
    ddr_limit = int(hardware.ddr_bytes // hardware.ranks_per_host * (1 - HEADROOM))
    rows = {name: config.num_embeddings for name, config in configs.items()}
    plan = Plan(hardware, batch_size, rows, shards, ranks, hbm_limit, ddr_limit, sharding)
    _check_limits(plan, embedding)
    return plan


def place_tables(
    network: Network,
    embedding: Embedding,
    *,
    hardware: Hardware,
    batch_size: int,
    reserved_bytes: int = 0,
    stats: Sequence[Stats] = (),
) -> ShardingPlan:
    """TorchRec's plan for the tables of a network, which are in their precisions by now (`resized`).

    `batch_size`, of one rank, helps to weigh memory and communication; `reserved_bytes` of each rank's memory are left
    to what is not a table.

    Raises:
        Fault: they do not fit; the largest tables and what would help are named.
    """
    tables = network.tables
    planner = planner_of(
        tables, embedding, hardware=hardware, batch_size=batch_size, reserved_bytes=reserved_bytes, stats=stats
    )
    logging.getLogger("torchrec.distributed.planner").setLevel(logging.ERROR)
    try:
        with states_shown(tables, embedding):
            return planner.plan(network, sharder_of(embedding, hardware.device))
    except PlannerError:
        sizes = {config.name: _whole_bytes(config, embedding) for config in tables.embedding_bag_configs()}
        raise too_large(sizes, embedding, hardware=hardware, reserved=reserved_bytes) from None


def _check_limits(plan: Plan, embedding: Embedding) -> None:
    """Also what the planner does not count has to fit."""
    for rank in plan.ranks:
        for name, held, limit in (("GPU", rank.hbm, plan.hbm_limit), ("host", rank.ddr, plan.ddr_limit)):
            if sum(held.values()) > limit:
                parts = ", ".join(f"{part} {size / GIB:,.1f}" for part, size in largest(held).items())
                tables = Counter[str]()
                for shard in plan.shards:
                    tables[shard.table] += (shard.weight_bytes + shard.state_bytes) * (shard.rank == rank.rank)
                named = ", ".join(f"'{table}' {size / GIB:,.1f}" for table, size in largest(+tables).items())
                got = f"rank {rank.rank} with {sum(held.values()) / GIB:,.1f} GiB of {name} memory, {parts} the most"
                got += f"; of its tables {named}" if named else ""
                remedy = "lower train.batch_size, take more ranks, or cut the rows of the largest tables"
                remedy += f", or place some in '{spilling_placement(embedding)}'" if name == "GPU" else ""
                raise Fault("plan", got=got, wanted=f"at most {limit / GIB:,.1f} GiB", remedy=remedy)


def _whole_bytes(config: EmbeddingBagConfig, embedding: Embedding) -> int:
    """Of a whole table with its states."""
    name, rows, columns = config.name, config.num_embeddings, config.embedding_dim
    return weight_bytes(embedding, name, rows=rows, columns=columns) + state_bytes(
        embedding, name, rows=rows, columns=columns
    )


def weight_bytes(embedding: Embedding, table: str, *, rows: int, columns: int) -> int:
    """Of the rows of a shard."""
    return rows * columns * (2 if embedding.of(table).precision == "fp16" else 4)


def state_bytes(embedding: Embedding, table: str, *, rows: int, columns: int) -> int:
    """Of the optimizer's states of a shard: fp32, one number a row or one or two a weight; none of a frozen table."""
    if embedding.of(table).frozen:
        return 0
    count = max(state_count(embedding), state_count(embedding.linear or embedding))
    if needs_own_rows(embedding):
        return max(count, 1) * rows * columns * 4  # FBGEMM's place for one is there for momentum-free SGD too
    return count * rows * (1 if embedding.rowwise else columns) * 4


def _shards(
    options: list[Any], configs: Mapping[str, EmbeddingBagConfig], *, embedding: Embedding
) -> Iterator[ShardPlan]:
    for option in sorted(options, key=lambda option: list(configs).index(option.name)):
        for shard in option.shards:
            rows, columns = shard.size
            yield ShardPlan(
                table=option.name,
                sharding=option.sharding_type,
                memory={"fused_uvm": "uvm", "fused_uvm_caching": "uvm_caching"}.get(option.compute_kernel, "own"),
                rank=int(shard.rank),
                first_row=shard.offset[0],
                first_column=shard.offset[1],
                rows=rows,
                columns=columns,
                weight_bytes=weight_bytes(embedding, option.name, rows=rows, columns=columns),
                state_bytes=state_bytes(embedding, option.name, rows=rows, columns=columns),
                ms=shard.perf.total,
            )


def _ranks(
    shards: tuple[ShardPlan, ...],
    configs: Mapping[str, EmbeddingBagConfig],
    *,
    network: Network,
    experiment: Experiment,
    hardware: Hardware,
    dense: Dense,
) -> Iterator[RankPlan]:
    embedding, rows = experiment.embedding, experiment.train.rank_rows
    slots = {name: len(config.feature_names) for name, config in configs.items()}
    width = sum(slots[name] * config.embedding_dim for name, config in configs.items())
    held: dict[int, list[ShardPlan]] = {rank: [] for rank in range(hardware.ranks)}
    for shard in shards:
        held[shard.rank].append(shard)
    # Those of the next step travel while this one computes, on several ranks and into caches.
    ids = _ID_BYTES * (2 if hardware.ranks > 1 or any(shard.memory == "uvm_caching" for shard in shards) else 1)
    # In order and as they came, both kept for the backward pass; of steps in parts also the parts' gradients, joined.
    copies = 2 if experiment.train.accumulate == 1 else 4
    for rank, own in held.items():
        parts = [_tables_bytes(shard, embedding, shards_slots=slots[shard.table]) for shard in own]
        looked = sum(_lookup_bytes(s, rows * slots[s.table], hardware=hardware, ids=ids) for s in own)
        looked += rows * (copies * width * 4 + sum(slots.values()) * ids)
        device = _sum(parts, "own") | {"lookups": looked} | dense.device(hardware.device)
        host = _sum(parts, "host") | dense.host(hardware.device)
        if experiment.train.saves_midway:  # from a copy
            host["checkpoint"] = sum(s.weight_bytes + s.state_bytes for s in own)
        sent = sum(_sent_bytes(s, slots[s.table], embedding=embedding, hardware=hardware, rows=rows) for s in own)
        sent += int(2 * dense.gradients * (hardware.ranks - 1) / hardware.ranks)
        cpu = hardware.device == "cpu"
        ddr = {name: device.get(name, 0) + host.get(name, 0) for name in device | host} if cpu else host
        yield RankPlan(rank, {} if cpu else device, ddr, sent, sum(s.ms for s in own))


def _sum(parts: list[dict[str, dict[str, int]]], place: str) -> dict[str, int]:
    names = dict.fromkeys(name for part in parts for name in part[place])
    return {name: sum(part[place].get(name, 0) for part in parts) for name in names}


def _tables_bytes(shard: ShardPlan, embedding: Embedding, *, shards_slots: int) -> dict[str, dict[str, int]]:
    """Bytes of a shard in its rank's own memory and, where it spills, in the host's."""
    whole = {"weights": shard.weight_bytes, "states": shard.state_bytes}
    if shard.sharding == "data_parallel":
        frozen = embedding.of(shard.table).frozen
        return {"own": whole | {"gradients": 0 if frozen else shard.rows * (shard.columns + 1) * 4}, "host": {}}
    if shard.memory == "own":
        return {"own": whole, "host": {}}
    if shard.memory == "uvm":
        return {"own": {}, "host": whole}
    cached = int(embedding.of(shard.table).cache_share * shard.rows)
    row_bytes = shard.weight_bytes // max(shard.rows, 1)
    # Beside the rows FBGEMM keeps 4 bytes for every row of the table, and 16 for each that the cache holds.
    return {"own": {"cache": cached * (row_bytes + 16) + shard.rows * 4}, "host": whole}


def _lookup_bytes(shard: ShardPlan, lookups: int, *, hardware: Hardware, ids: int) -> int:
    """Ids that come to a shard from all ranks, and what is looked up for them before it is sent back.

    A rank makes so many `lookups` of the table; `ids` are the bytes of an id.
    """
    if shard.sharding == "data_parallel":
        return lookups * shard.columns * 4
    parts = {"row_wise": hardware.ranks}.get(shard.sharding, hardware.ranks_per_host)
    share = 1 / parts if shard.sharding in _ROW_CUTS else 1.0
    return int(hardware.ranks * lookups * (share * ids + shard.columns * 4))


def _sent_bytes(shard: ShardPlan, slots: int, *, embedding: Embedding, hardware: Hardware, rows: int) -> int:
    """Bytes a shard makes its rank send in a step: pooled rows forward, and their ids and gradients on their way here.

    Gradients and ids come from all ranks alike, so what a rank receives for its shards is what it sends on the mean.
    """
    others = hardware.ranks - 1
    if shard.sharding == "data_parallel":
        return (
            0
            if embedding.of(shard.table).frozen
            else int(2 * shard.rows * (shard.columns + 1) * 4 * others / hardware.ranks)
        )
    sizes = _SENT_BYTES[embedding.forward_comm] + _SENT_BYTES[embedding.backward_comm]
    parts = {"row_wise": hardware.ranks}.get(shard.sharding, hardware.ranks_per_host)
    share = 1 / parts if shard.sharding in _ROW_CUTS else 1.0
    return int(rows * others * slots * (shard.columns * sizes + share * _ID_BYTES))
