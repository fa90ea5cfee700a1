"""What an experiment may ask of its tables, and what it is told where it may not."""

from collections.abc import Callable
from typing import Any

import pytest

from etl.faults import Faults
from recsys.experiment import Embedding, Experiment

ADAGRAD = {"optimizer": "adagrad"}


def test_a_table_says_what_differs() -> None:
    embedding = Embedding.model_validate(
        {"sharding": "row_wise", "precision": "fp16", "tables": {"item": {"sharding": "table_wise", "column_width": 8}}}
    )
    assert embedding.of("user").model_dump() == {
        "sharding": "row_wise",
        "placement": "auto",
        "precision": "fp16",
        "column_width": None,
        "cache_share": 0.2,
        "frozen": False,
    }
    assert embedding.of("item").sharding == "table_wise"
    assert (embedding.of("item").precision, embedding.of("item").column_width) == ("fp16", 8)


@pytest.mark.parametrize(
    ("embedding", "said"),
    [
        ({"tables": {"itme": {}}}, "embedding.tables.itme: no such table, wanted one of user, item, pair"),
        ({"sharding": "column_wise"}, "rowwise_adagrad keeps one state a row, sharding is 'column_wise'"),
        (
            ADAGRAD | {"linear": {"optimizer": "sgd"}, "tables": {"pair": {"placement": "uvm_caching"}}},
            "embedding.tables.pair: placement 'uvm_caching' needs train.device = 'cuda'",
        ),
        ({"sharding": "data_parallel", "precision": "fp16"}, "data_parallel tables are fp32"),
        ({"forward_comm": "bf16"}, "gloo has no bf16 communication"),
        ({"column_width": 6}, "column_width"),
        ({"tables": {"item": {"frozen": True}}}, "embedding.tables.item: frozen rows would stay as drawn at random"),
        ({"frozen": True}, "embedding: frozen rows would stay as drawn at random"),
    ],
)
def test_what_cannot_be_is_refused(experiment: Callable[..., Experiment], embedding: dict[str, Any], said: str) -> None:
    with pytest.raises(Faults) as faults:
        experiment(embedding=embedding)
    assert said in str(faults.value)


def test_columns_may_be_cut_where_each_weight_has_its_state(experiment: Callable[..., Experiment]) -> None:
    assert experiment(embedding=ADAGRAD | {"sharding": "grid_shard"}).embedding.of("item").sharding == "grid_shard"
