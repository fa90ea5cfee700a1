"""A lone rank's lookups without torchrec's exchanges."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec import KeyedJaggedTensor, KeyedTensor
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection

from recsys.learner import Learner
from recsys.parallel.tables import Tables
from recsys.parallel.world import open_world
from tests.recsys.conftest import ROWS, SCHEMA, experiment
from tests.recsys.test_dims import FEATURES, rows
from tests.recsys.test_learner import learnt

pytestmark = pytest.mark.usefixtures("quiet")
CASES: dict[str, dict[str, Any]] = {
    "one module": {},
    "another order and several widths": {"features": FEATURES},
    "several modules": {"embedding": {"tables": {"item": {"frozen": True}}}, "train": {"start_from": "a run"}},
}


@pytest.mark.parametrize("sections", CASES.values(), ids=CASES)
def test_rows_are_those_of_torchrec(sections: dict[str, Any]) -> None:
    ids_BS, floats_BN = rows()
    with open_world("cpu") as world:
        chosen = experiment(model={"keep_prob": 1.0}, **sections)
        network = Learner(chosen, SCHEMA, world=world).model.module
        first = network(ids_BS, floats_BN).logits_BT
        tables, lookups = network.tables, network.lookups(ids_BS)
        wanted, found = ShardedEmbeddingBagCollection.forward(tables, lookups).wait(), tables(lookups)
        network.eval()
        again = [network(ids_BS[:size], floats_BN[:size]).logits_BT for size in (50, 7, 50)]
    assert type(found) is KeyedTensor and type(tables) is Tables
    assert (found.keys(), found.length_per_key()) == (wanted.keys(), wanted.length_per_key())
    assert torch.equal(found.values(), wanted.values()) and found.values().any()
    assert torch.equal(again[0], again[2]) and torch.allclose(again[0][:7], again[1], rtol=0, atol=1e-6)
    assert torch.equal(first, again[0])  # the first one went through torchrec


@pytest.mark.parametrize("sections", CASES.values(), ids=CASES)
def test_learns_the_same(dataset: Path, sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = experiment(model={"keep_prob": 1.0}, **sections)
    with open_world("cpu") as world:
        found, losses = learnt(chosen, SCHEMA, data=dataset, world=world)
        monkeypatch.setattr(Tables, "_whole_and_alone", lambda self: False)
        wanted, theirs = learnt(chosen, SCHEMA, data=dataset, world=world)
    assert losses == theirs
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("compiled", [True, False])
def test_bags_may_be_empty_or_long(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr("recsys.parallel.kernels.library", lambda: None)
    lengths = torch.tensor([0, 3, 1, 2, 0, 0, 1, 1, 0], dtype=torch.int32)
    with open_world("cpu") as world:
        tables = Learner(experiment(), SCHEMA, world=world).model.module.tables
        bags = KeyedJaggedTensor(list(ROWS), torch.tensor([59, 0, 0, 7, 29, 29, 399, 1]), lengths=lengths)
        wanted = ShardedEmbeddingBagCollection.forward(tables, bags).wait().values()
        found = tables(bags)
    assert type(found) is KeyedTensor
    assert torch.equal(found.values(), wanted) and wanted.any()
    assert not found["user"][0].any() and found["user"][1].any()


def test_copied_tables_go_through_torchrec() -> None:
    ids_BS, _ = rows()
    with open_world("cpu") as world:
        network = Learner(experiment(embedding={"sharding": "data_parallel"}), SCHEMA, world=world).model.module
        network.rows(ids_BS)
        assert type(network.tables(network.lookups(ids_BS))) is not KeyedTensor
