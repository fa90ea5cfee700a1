"""The Workflow of a feature spec: NVTabular's own operators where they are right, those of `operators` elsewhere."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from etl.artifact import Json
from etl.engines.nvtabular.library import Categorify, Clip, ColumnSelector, FillMissing, Workflow
from etl.engines.nvtabular.operators import Buckets, FillMean, FillMiddle, Hashed, Log1p, Scale
from etl.engines.nvtabular.plan import Plan
from etl.engines.nvtabular.statistics import Ends, Ordered, Quantiles
from etl.faults import Fault
from etl.spec import Numeric, column_of


@dataclass
class Graph:
    """The operators that hold fitted state, by column, and the Workflow of them all."""

    categorify: Any = None
    fills: dict[str, FillMean | FillMiddle] = field(default_factory=dict)
    scales: dict[str, Scale] = field(default_factory=dict)
    quantiles: dict[str, Ordered] = field(default_factory=dict)
    workflow: Any = None

    def vocabulary(self, columns: tuple[str, ...]) -> Path:
        """Where Categorify has written the values of the columns of one table."""
        return Path(self.categorify.categories["_".join(columns)])

    def use(self, columns: tuple[str, ...], vocabulary: Path) -> None:
        """Makes Categorify read another file: it caches files by path, and on workers never looks again."""
        self.categorify.categories["_".join(columns)] = str(vocabulary)

    def boundaries(self, name: str, feature: Numeric) -> list[float]:
        """The inner edges of buckets. Raises Fault where they are quantiles of no value."""
        if feature.boundaries:
            return feature.boundaries
        if not self.quantiles[name].found[name]:
            raise _empty(feature)
        return self.quantiles[name].edges(name)

    def scale_step(self, name: str, feature: Numeric) -> Json:
        """How a number is filled and scaled, as the served transform has it.

        Raises:
            Fault: no value to fill by, or numbers whose moments leave the range of float64.
        """
        fill = self.fills[name].value(name) if name in self.fills else float(feature.fill)
        if fill is None:
            raise _empty(feature)
        scaled = self.scales.get(name)
        mean, std = (scaled.means[name], scaled.stds[name]) if scaled else (0.0, 1.0)
        if not all(map(math.isfinite, (fill, mean, std))):
            got, remedy = "numbers too large for their mean and deviation", "set 'clip' and 'fill', or scale = \"none\""
            raise Fault(f"features.{feature.name}", got=got, wanted="moments within float64", remedy=remedy)
        clip = list(feature.clip) if feature.clip else None
        step = {"name": str(feature.name), "column": column_of(feature), "fill": fill, "clip": clip}
        return step | {"log1p": feature.log1p, "mean": float(mean), "std": float(std)}


def build(plan: Plan, *, out: Path) -> Graph:
    """The graph of a plan, not fitted. Categorify writes into `out`, which nothing else may write into."""
    graph = Graph()
    nodes = [*_vocabularies(plan, graph, out=out), *_numbers(plan, graph)]
    buckets = _buckets(plan, graph)
    nodes += buckets.values()
    if plan.hashes:
        nodes.append(_hashes(plan, buckets))
    output = nodes[0]
    for node in nodes[1:]:
        output = output + node
    graph.workflow = Workflow(output)
    return graph


def _vocabularies(plan: Plan, graph: Graph, *, out: Path) -> list[Any]:
    """One Categorify for all tables; columns of one table are encoded together."""
    if not plan.tables:
        return []
    alone = [columns[0] for columns in plan.tables.values() if len(columns) == 1]
    together = [ColumnSelector(list(columns)) for columns in plan.tables.values() if len(columns) > 1]
    graph.categorify = Categorify(out_path=str(out))
    return [ColumnSelector(alone, subgroups=together) >> graph.categorify]


def _numbers(plan: Plan, graph: Graph) -> list[Any]:
    """One chain for all dense inputs and fields with the same settings."""
    numbers = plan.numeric("dense", "field")

    def settings(name: str) -> str:
        feature = numbers[name]
        return repr((feature.fill, feature.clip, feature.log1p, feature.scale))

    chains = groupby(sorted(numbers, key=settings), settings)
    return [_chain(list(names), numbers, graph=graph) for _, names in chains]


def _chain(names: list[str], numbers: Mapping[str, Numeric], *, graph: Graph) -> Any:
    """Fill, clip, log1p and scale."""
    feature = numbers[names[0]]
    if isinstance(feature.fill, str):
        fill = FillMiddle(names) if feature.fill == "median" else FillMean()
        graph.fills |= dict.fromkeys(names, fill)
        node = ColumnSelector(names) >> fill
    else:
        node = ColumnSelector(names) >> FillMissing(fill_val=feature.fill)
    if feature.clip:
        node = node >> Clip(min_value=feature.clip[0], max_value=feature.clip[1])
    if feature.log1p:
        node = node >> Log1p()
    if feature.scale == "none":
        return node
    ends = Ends()
    scale = Scale(ends, dict.fromkeys(names, feature.scale))
    graph.scales |= dict.fromkeys(names, scale)
    return node >> ends >> scale


def _buckets(plan: Plan, graph: Graph) -> dict[str, Any]:
    """Each bucket column's node."""
    nodes = {}
    for name, feature in plan.numeric("buckets").items():
        if feature.boundaries:
            nodes[name] = [name] >> Buckets({name: feature.boundaries})
            continue
        graph.quantiles[name] = ordered = Ordered({name: Quantiles(feature.quantiles or 2)})
        nodes[name] = [name] >> ordered >> Buckets(ordered.edges)
    return nodes


def _hashes(plan: Plan, buckets: Mapping[str, Any]) -> Any:
    """One node for all hashes: it reads key columns as they are, and bucket columns after their own node."""
    inputs = list(dict.fromkeys(name for made in plan.hashes for name in made.inputs))
    edged = [name for name in inputs if name in buckets]
    keys = [name for name in inputs if name not in buckets]
    read = ColumnSelector(keys) if keys else buckets[edged.pop(0)]
    for name in edged:
        read = read + buckets[name]
    return read >> Hashed(plan.hashes, buckets=list(buckets))


def _empty(feature: Numeric) -> Fault:
    return Fault(
        f"features.{feature.name}",
        got="no value in the training rows",
        wanted="at least one",
        remedy="drop the feature or give fill",
    )
