"""Tables whose vectors are smaller than the model's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec import KeyedTensor

from deploy.program import Precision, served_network
from etl.faults import Faults
from recsys.learner import Learner
from recsys.network import Network, build_network
from recsys.parallel.world import open_world
from tests.recsys.conftest import SCHEMA, experiment
from tests.recsys.test_learner import SETTINGS, flat, learnt

pytestmark = pytest.mark.usefixtures("quiet")
FEATURES: list[dict[str, Any]] = [
    {"type": "categorical", "name": "user", "dim": 4},
    {"type": "categorical", "name": "item"},
    {"type": "cross", "name": "pair", "inputs": ["user", "item"], "hash_rows": 400, "linear_only": True},
    {"type": "numeric", "columns": ["x", "y"]},
]


def drawn(**sections: Any) -> Network:
    """A network with random rows, and what comes before the vector's end and after it."""
    network = build_network(experiment(features=FEATURES, **sections), SCHEMA, table_device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in network.tables.parameters():
        parameter.data.normal_(generator=generator)
    return network


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids_BS = torch.stack([torch.randint(0, size, (50,), generator=generator) for size in (60, 30, 400)], dim=1)
    return ids_BS, torch.randn(50, 2, generator=generator)


def test_vectors_end_with_zeros_and_gradients_leave_them() -> None:
    network, (ids_BS, floats_BN) = drawn(), rows()
    user_RW, item_RW = (network.tables.embedding_bags[name].weight for name in ("user", "item"))
    assert (tuple(user_RW.shape), tuple(item_RW.shape)) == ((60, 4 + 4), (30, 8 + 4))
    inputs = network.inputs(ids_BS, floats_BN)
    user_BW, item_BW = user_RW[ids_BS[:, 0]], item_RW[ids_BS[:, 1]]
    torch.testing.assert_close(inputs.emb_BFK[:, 0], torch.cat([user_BW[:, :4], torch.zeros(50, 4)], dim=1))
    torch.testing.assert_close(inputs.emb_BFK[:, 1], item_BW[:, :8])
    torch.testing.assert_close(inputs.linear_BL[:, :2], torch.stack([user_BW[:, 4], item_BW[:, 8]], dim=1))
    weights = torch.randn(inputs.emb_BFK.shape), torch.randn(50, 2)
    ((inputs.emb_BFK * weights[0]).sum() + (inputs.linear_BL[:, :2] * weights[1]).sum()).backward()
    gradient_BW = torch.cat([weights[0][:, 0, :4], weights[1][:, :1], torch.zeros(50, 3)], dim=1)
    torch.testing.assert_close(user_RW.grad, torch.zeros(60, 8).index_add(0, ids_BS[:, 0], gradient_BW))


def test_answers_come_in_any_order() -> None:
    network, (ids_BS, _) = drawn(), rows()
    looked = network.tables(network.lookups(ids_BS))
    names = looked.keys()[::-1]
    turned = KeyedTensor.regroup([looked], [names])[0]
    wanted_BD = network.rows(ids_BS)
    network._order = None
    found_BD = network._in_order(KeyedTensor(names, looked.length_per_key()[::-1], turned))
    assert torch.equal(found_BD, wanted_BD)
    assert wanted_BD.shape[1] == 12 + 12 + 4


@pytest.mark.parametrize("precision", [Precision(), Precision("int8", "bf16")])
def test_served_scores_are_the_same(precision: Precision) -> None:
    network, (ids_BS, floats_BN) = drawn().eval(), rows()
    with torch.inference_mode():
        wanted_BT = network(ids_BS, floats_BN).logits_BT
        found_BT = served_network(network, precision).logits_BT(ids_BS, floats_BN)
    torch.testing.assert_close(found_BT, wanted_BT, rtol=0, atol=1e-6 if precision == Precision() else 0.2)


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
@pytest.mark.parametrize("sharding", ["auto", "data_parallel"])
def test_what_is_stored_learns(dataset: Path, optimizer: str, sharding: str) -> None:
    sections = {"embedding": SETTINGS[optimizer] | {"dim": 8, "sharding": sharding}, "model": {"keep_prob": 1.0}}
    with open_world("cpu") as world:
        chosen = experiment(features=FEATURES, **sections)
        before = flat(Learner(chosen, SCHEMA, world=world).sharded.model.state_dict())
        found, losses = learnt(chosen, SCHEMA, data=dataset, world=world)
    (start,), (weight,) = (
        [value for name, value in of.items() if name.endswith("tables.embedding_bags.user.weight")]
        for of in (before, found)
    )
    assert tuple(weight.shape) == (60, 8)
    assert all(loss < 1 for loss in losses)
    moved_W = (weight != start).any(dim=0)
    assert moved_W.tolist() == [True] * 5 + [False] * 3


@pytest.mark.parametrize(
    ("user", "item", "message"),
    [
        ({"dim": 12}, {}, r"tables with a dim above embedding.dim, 8: {'user': 12}"),
        ({"dim": 6}, {}, "multiple of 4"),
        ({"dim": 4, "linear_only": True}, {}, "drop one of them"),
        ({"dim": 4, "table": "both"}, {"table": "both"}, "linear_only and dim"),
    ],
)
def test_sizes_that_can_not_be(user: dict[str, Any], item: dict[str, Any], message: str) -> None:
    pair = [{"type": "categorical", "name": name} | more for name, more in (("user", user), ("item", item))]
    with pytest.raises(Faults, match=message):
        experiment(features=pair)


def test_the_dataset_does_not_depend_on_it() -> None:
    plain = [{key: value for key, value in feature.items() if key != "dim"} for feature in FEATURES]
    assert experiment(features=FEATURES).data_hash() == experiment(features=plain).data_hash()
