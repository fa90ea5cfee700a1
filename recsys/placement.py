"""How tables lie over ranks: how each is cut, in which memory, and in which precision it is kept and sent."""

from collections.abc import Collection
from typing import Literal

from pydantic import Field

from etl.spec import Section

Sharding = Literal[
    "auto",
    "data_parallel",
    "table_wise",
    "row_wise",
    "column_wise",
    "table_row_wise",
    "table_column_wise",
    "grid_shard",
]
Memory = Literal["auto", "hbm", "uvm", "uvm_caching"]
Precision = Literal["fp32", "fp16"]
COLUMN_SHARDINGS = ("column_wise", "table_column_wise", "grid_shard")
LANE = 4


class TablePlacement(Section):
    """One table's own settings; what is unset is as `[embedding]` says."""

    sharding: Sharding | None = None
    placement: Memory | None = None
    precision: Precision | None = None
    column_width: int | None = Field(None, ge=LANE, multiple_of=LANE)
    cache_share: float | None = Field(None, gt=0, le=1)
    frozen: bool | None = None


class Placement(Section):
    """How the tables are cut and kept, each unless `tables` says otherwise."""

    sharding: Sharding = Field(
        "auto",
        description="auto: the planner chooses for each table; data_parallel: a copy on each rank, when asked for; "
        "a table with too few rows for a row of it on each rank stays whole",
    )
    placement: Memory = Field(
        "auto",
        description="CUDA: hbm, uvm (host memory), uvm_caching (host memory behind a cache); auto: hbm, and "
        "some tables spill where not all fit",
    )
    cache_share: float = Field(0.2, gt=0, le=1, description="uvm_caching: share of the rows that the cache holds")
    precision: Precision = Field("fp32", description="of the stored rows; states, lookups and gradients stay fp32")
    column_width: int | None = Field(
        None, ge=LANE, multiple_of=LANE, description="column cuts: floats of a shard; unset: as many shards as ranks"
    )
    forward_comm: Literal["fp32", "fp16", "bf16"] = Field("fp32", description="looked up rows on their way to a rank")
    backward_comm: Literal["fp32", "fp16", "bf16"] = Field("fp32", description="their gradients on the way back")
    frozen: bool = Field(False, description="rows stay as the run that training starts from left them; no states")
    tables: dict[str, TablePlacement] = Field(default_factory=dict, description="settings of single tables by name")

    def of(self, table: str) -> "Resolved":
        """What holds for one table."""
        own = self.tables.get(table, TablePlacement())
        return Resolved(
            sharding=own.sharding or self.sharding,
            placement=own.placement or self.placement,
            precision=own.precision or self.precision,
            column_width=own.column_width or self.column_width,
            cache_share=own.cache_share or self.cache_share,
            frozen=self.frozen if own.frozen is None else own.frozen,
        )


class Resolved(Section):
    """One table's settings, none left open."""

    sharding: Sharding
    placement: Memory
    precision: Precision
    column_width: int | None
    cache_share: float
    frozen: bool


def placement_faults(placement: Placement, tables: Collection[str], *, device: str, rowwise: bool) -> list[str]:
    """What cannot be, a sentence each; `rowwise`: the optimizer keeps one state for a whole row."""
    faults = [
        f"embedding.tables.{name}: no such table, wanted one of {', '.join(tables)}"
        for name in placement.tables
        if name not in tables
    ]
    if device == "cpu" and "bf16" in (placement.forward_comm, placement.backward_comm):
        faults.append("embedding: gloo has no bf16 communication, wanted 'fp16' or 'fp32'")
    for place, one in _distinct(placement):
        if one.sharding in COLUMN_SHARDINGS and rowwise:
            remedy = "take 'adagrad' or cut rows: with the columns cut each shard would have a state of its own"
            faults.append(f"{place}: rowwise_adagrad keeps one state a row, sharding is '{one.sharding}'; {remedy}")
        if one.placement in ("uvm", "uvm_caching") and device == "cpu":
            faults.append(f"{place}: placement '{one.placement}' needs train.device = 'cuda'")
        if one.sharding == "data_parallel" and (one.precision == "fp16" or one.placement in ("uvm", "uvm_caching")):
            faults.append(f"{place}: data_parallel tables are fp32 in device memory; set 'precision' and 'placement'")
    return faults


def _distinct(placement: Placement) -> list[tuple[str, Resolved]]:
    named = [(f"embedding.tables.{name}", placement.of(name)) for name in placement.tables]
    return [("embedding", placement.of("")), *named]
