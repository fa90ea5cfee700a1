"""The fitted Workflow as the state of the served transform."""

from etl.artifact import Json
from etl.engines.nvtabular.plan import Looked, Plan
from etl.engines.nvtabular.workflow import Graph
from etl.spec import Bag, Cross, Numeric, column_of, table_of


def looked_step(feature: Looked) -> Json:
    """The step of ids that are looked up or hashed."""
    weights = feature.weight_column if isinstance(feature, Bag) else None
    step = {"name": str(feature.name), "table": table_of(feature), "column": column_of(feature), "weights": weights}
    return step | ({"kind": "hash", "rows": feature.hash_rows} if feature.hash_rows else {"kind": "vocabulary"})


def id_step(feature: Looked | Numeric | Cross, *, plan: Plan, graph: Graph) -> tuple[Json, int]:
    """The step of one id feature, and the rows of its table where that is its own (0: a vocabulary or a hash).

    Raises:
        Fault: the training rows hold no value that it needs.
    """
    if not isinstance(feature, Numeric | Cross):
        return looked_step(feature), 0
    name = str(feature.name)
    if isinstance(feature, Cross):
        step = {"name": name, "kind": "cross", "table": name, "inputs": list(feature.inputs), "rows": feature.hash_rows}
        return step, feature.hash_rows
    column = plan.of[name]
    if feature.as_ == "field":
        return graph.scale_step(column, feature) | {"kind": "field", "table": name}, 2
    edges = graph.boundaries(column, feature)
    step = {"name": name, "kind": "buckets", "table": name, "column": column_of(feature), "boundaries": edges}
    return step, len(edges) + 2
