"""A plan as people and programs read it: as text, as JSON, as a picture; and the schema where there is no data yet."""

from collections.abc import Mapping
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from etl.artifact import Json
from etl.faults import Fault
from etl.schema import DenseFeature, IdFeature, Schema, Table, TaskColumn, read_schema
from etl.spec import Bag, Count, Cross, Numeric, Sequence, Target, resolve, table_of
from recsys.experiment import Experiment
from recsys.host_memory import host_memory_bytes
from recsys.plan_options import PlanOptions

if TYPE_CHECKING:
    from recsys.parallel.plan import Plan, RankPlan, ShardPlan

GIB = 1 << 30
_GPU_HOST_GIB = 2048


def plan_for(experiment: Experiment, options: PlanOptions) -> "Plan":
    """The plan on the hardware that the options describe.

    Raises:
        Fault, Faults: the options don't fit together, a table's size is unknown, or the tables do not fit.
    """
    from recsys.parallel.plan import make_plan
    from recsys.parallel.sharders import Hardware

    hosts, device = options.host_count, experiment.train.device
    data = options.data or Path("out") / experiment.name / "data"
    schema = schema_for(experiment, data, rows=options.row_counts())
    ddr_gib = options.ddr_gib or (_GPU_HOST_GIB if device == "cuda" else host_memory_bytes() / GIB)
    hbm_bytes = int(options.hbm_gib * GIB) if device == "cuda" else 0
    hardware = Hardware(options.world_size, hosts, device, hbm_bytes, int(ddr_gib * GIB))
    return make_plan(experiment, schema, hardware=hardware)


def schema_for(experiment: Experiment, data: Path, *, rows: Mapping[str, int]) -> Schema:
    """The dataset's schema where there is one, else one that the experiment implies; `rows` overrides table sizes.

    Raises:
        Fault: a table whose size nothing says, or an override that names no table.
    """
    found = read_schema(data) if (data / "schema.json").is_file() else _implied(experiment)
    known = {table.name: rows.get(table.name, table.rows) for table in found.tables}
    if strangers := sorted(set(rows) - set(known)):
        remedy = f"name one of {', '.join(known)}"
        raise Fault(f"--rows {strangers[0]}", got="no such table", wanted="a table of the experiment", remedy=remedy)
    if unknown := [name for name, count in known.items() if count < 1]:
        got, remedy = f"no size of {', '.join(unknown)}", f"run the ETL, or say --rows {unknown[0]}=1000000"
        raise Fault(str(data), got=got, wanted="a dataset folder or the tables' rows", remedy=remedy)
    return found.model_copy(update={"tables": tuple(Table(name=name, rows=count) for name, count in known.items())})


def _implied(experiment: Experiment) -> Schema:
    """What the ETL would write, with 0 rows where only the data can say."""
    features, dense, tables = [], [], {}
    for feature in resolve(experiment.features):
        name = str(feature.name)
        if isinstance(feature, Target | Count) or (isinstance(feature, Numeric) and feature.as_ == "dense"):
            dense.append(DenseFeature(name=name))
            continue
        kind: str
        if isinstance(feature, Numeric | Cross):
            table, kind = name, feature.as_ if isinstance(feature, Numeric) else "cross"
            tables[table] = _own_rows(feature)
        else:
            table, kind = table_of(feature), feature.type
            tables[table] = max(tables.get(table, 0), feature.hash_rows or feature.max_rows or 0)
        weighted = kind == "field" or (isinstance(feature, Bag) and feature.weight_column is not None)
        described = IdFeature(name=name, type=kind, table=table, linear_only=feature.linear_only, weighted=weighted)
        if isinstance(feature, Bag | Sequence):
            lists = {"slots": feature.max_length, "combiner": feature.combiner, "dtype": "list<int64>"}
            described = described.model_copy(update=lists)
        features.append(described)
    tasks = tuple(TaskColumn(name=task.name, positive_rate=0.5) for task in experiment.tasks)
    sized = tuple(Table(name=name, rows=count) for name, count in tables.items())
    return Schema(features=tuple(features), dense=tuple(dense), tables=sized, tasks=tasks)


def _own_rows(feature: Numeric | Cross) -> int:
    if isinstance(feature, Cross):
        return feature.hash_rows
    return (
        2
        if feature.as_ == "field"
        else len(feature.boundaries) + 2
        if feature.boundaries
        else (feature.quantiles or 0) + 1
    )


def as_json(plan: "Plan") -> Json:
    """Everything, in bytes and milliseconds."""
    return {
        "hardware": asdict(plan.hardware),
        "batch_size": plan.batch_size,
        "limits": {"hbm": plan.hbm_limit, "ddr": plan.ddr_limit},
        "imbalance": {
            "bytes": _imbalance([_bytes(r) for r in plan.ranks]),
            "ms": _imbalance([r.ms for r in plan.ranks]),
        },
        "tables": dict(plan.tables),
        "ranks": [asdict(rank) for rank in plan.ranks],
        "shards": [asdict(shard) for shard in plan.shards],
    }


def as_text(plan: "Plan") -> str:
    """The tables with their ranks, the memory of the fullest and of the emptiest rank, and what travels."""
    h = plan.hardware
    where = f"{h.hosts:,} host{'s' if h.hosts > 1 else ''} of {h.ranks_per_host}" if h.ranks > 1 else "alone"
    memory = f"{h.hbm_bytes / GIB:,.0f} GiB each, " if h.device == "cuda" else ""
    memory += f"{h.ddr_bytes / GIB:,.0f} GiB a host"
    lines = [f"{h.ranks:,} x {h.device}, {where}; {memory}; batch {plan.batch_size:,} a rank"]
    lines += ["", *_aligned(["table", "rows", "GiB", "sharding", "memory", "ranks", "GiB a shard"], _table_rows(plan))]
    full, empty = (choose(plan.ranks, key=_bytes) for choose in (max, min))
    for place, limit in (("hbm", plan.hbm_limit), ("ddr", plan.ddr_limit)):
        fullest: Mapping[str, int] = getattr(full, place)
        if not fullest:
            continue
        rows = [[name, _gib(size), _gib(getattr(empty, place).get(name, 0))] for name, size in fullest.items()]
        total = sum(fullest.values())
        rows.append(["sum", _gib(total), _gib(sum(getattr(empty, place).values()))])
        heads = [place, f"GiB on rank {full.rank} (fullest)", f"on rank {empty.rank} (emptiest)"]
        lines += ["", *_aligned(heads, rows), f"of {limit / GIB:,.2f} GiB that a rank may use: {total / limit:.0%}"]
    bytes_, ms = _imbalance([_bytes(rank) for rank in plan.ranks]), _imbalance([rank.ms for rank in plan.ranks])
    sent = max(rank.sent_bytes for rank in plan.ranks)
    lines += ["", f"imbalance (largest over mean): memory {bytes_:.2f}, work {ms:.2f}"]
    slowest = max(rank.ms for rank in plan.ranks)
    lines.append(f"a step: up to {sent / 1e6:,.1f} MB sent by a rank; the planner expects {slowest:,.2f} ms for tables")
    return "\n".join(lines)


def write_picture(plan: "Plan", path: Path) -> None:
    """Memory of every rank by what it is for, as .svg or .png."""
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure

    from recsys.plots import SIZE, STYLE

    colors = {"text.color": "#1b1b1b", "axes.labelcolor": "#1b1b1b", "grid.color": "#dddddd"}
    ticks = dict.fromkeys(("xtick.color", "ytick.color", "xtick.labelcolor", "ytick.labelcolor"), "#555555")
    with matplotlib.rc_context(STYLE | colors | ticks | {"axes.edgecolor": "#555555", "svg.hashsalt": "plan"}):
        figure = Figure(figsize=(2 * SIZE[0] / 72, SIZE[1] / 72), layout="constrained")
        axes, place = figure.add_subplot(), "hbm" if plan.hbm_limit else "ddr"
        base = np.zeros(len(plan.ranks))
        for name in dict.fromkeys(name for rank in plan.ranks for name in getattr(rank, place)):
            sizes = np.array([getattr(rank, place).get(name, 0) / GIB for rank in plan.ranks])
            edges = np.arange(len(plan.ranks) + 1) - 0.5
            axes.stairs(base + sizes, edges, baseline=base, fill=True, label=name)
            base = base + sizes
        limit = (plan.hbm_limit or plan.ddr_limit) / GIB
        if limit < 4 * base.max():
            axes.axhline(limit, color="#555555", linewidth=1, dashes=(2, 2))
        axes.set(xlabel="rank", ylabel=f"GiB of {'GPU' if plan.hbm_limit else 'host'} memory")
        axes.margins(x=0)
        figure.legend(loc="outside right upper", frameon=False)
        beside = path.with_name(f".{path.name}{path.suffix}")
        figure.savefig(beside, metadata={"Date": None} if path.suffix == ".svg" else {})
        beside.replace(path)


def _bytes(rank: "RankPlan") -> int:
    return sum(rank.hbm.values()) or sum(rank.ddr.values())


def _imbalance(values: list[int] | list[float]) -> float:
    mean = sum(values) / len(values)
    return max(values) / mean if mean else 1.0


def _gib(size: int) -> str:
    return f"{size / GIB:,.3f}"


def _table_rows(plan: "Plan") -> list[list[str]]:
    """Shards of equal size on neighbouring ranks share a line."""
    found = []
    for table, shards in groupby(plan.shards, key=lambda shard: shard.table):
        held = list(shards)
        total = sum(_held(shard) for shard in held)
        largest = max(_held(shard) for shard in held)
        first, ranks = held[0], sorted({shard.rank for shard in held})
        if first.sharding == "data_parallel":
            total = largest
        memory = "uvm" if first.memory == "uvm" else "uvm, cached" if first.memory == "uvm_caching" else ""
        found.append(
            [table, f"{plan.tables[table]:,}", _gib(total), first.sharding, memory, _ranges(ranks), _gib(largest)]
        )
    return found


def _held(shard: "ShardPlan") -> int:
    return shard.weight_bytes + shard.state_bytes


def _ranges(ranks: list[int]) -> str:
    """0, 1, 2, 5 as 0-2, 5."""
    place = {rank: at for at, rank in enumerate(ranks)}
    runs = [list(run) for _, run in groupby(ranks, key=lambda rank: rank - place[rank])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _aligned(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Columns of text; numbers to the right."""
    widths = [max(len(row[at]) for row in [heads, *rows]) for at in range(len(heads))]
    right = [all(row[at][:1].isdigit() and "-" not in row[at] for row in rows) for at in range(len(heads))]
    return [
        "  ".join(text.rjust(w) if r else text.ljust(w) for text, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in [heads, *rows]
    ]
