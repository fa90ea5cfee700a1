"""Every model of the registry keeps the same contract, on a schema with every kind of feature."""

import copy

import pytest
import torch
from torch import Tensor

from etl.schema import Schema
from recsys.layout import Layout
from recsys.models import MODELS
from recsys.models.head import Inputs
from recsys.models.wide_deep import WideDeepConfig
from recsys.network import Network, init_rows
from tests.registry import config_of, id_feature, network_of, random_rows, rich_schema, schema_of

ONE_FIELD = schema_of((id_feature("user"),), dense=2, tasks=("click",))
SEQUENCE_MODELS = ("din", "bst")
"""They need a candidate and its history, so more than one feature."""


def inputs_of(network: Network, ids_BS: Tensor, floats_BN: Tensor) -> Inputs:
    """What the head would read, as float64 copies."""
    found = network.inputs(ids_BS, floats_BN)
    return Inputs(*(tuple(t.double() for t in p) if isinstance(p, tuple) else p.double() for p in found))


def _detached(inputs: Inputs) -> Inputs:
    return Inputs(*(tuple(t.detach() for t in p) if isinstance(p, tuple) else p.detach() for p in inputs))


def tasks_of(kind: str) -> tuple[str, ...]:
    return ("click", "conversion") if kind == "esmm" else ("click",)


@pytest.mark.parametrize("kind", MODELS)
class TestEveryModel:
    def test_gradients_reach_every_parameter(self, kind: str) -> None:
        schema = rich_schema()
        network = network_of(config_of(kind), schema)
        network(*random_rows(schema, 256)).logits_BT.square().sum().backward()
        silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum()]
        assert silent == []

    def test_rows_do_not_see_each_other(self, kind: str) -> None:
        schema = rich_schema()
        network = network_of(config_of(kind), schema, std=0.2)
        ids_BS, floats_BN = random_rows(schema, 16)
        with torch.no_grad():
            alone = [network(ids_BS[at : at + 1], floats_BN[at : at + 1]).logits_BT for at in range(16)]
            torch.testing.assert_close(network(ids_BS, floats_BN).logits_BT, torch.cat(alone), rtol=1e-4, atol=1e-5)

    def test_float32_equals_float64(self, kind: str) -> None:
        schema = rich_schema()
        network = network_of(config_of(kind), schema, std=0.1)
        rows = random_rows(schema, 64)
        with torch.no_grad():
            exact_BT = copy.deepcopy(network.head).double()(inputs_of(network, *rows))
            torch.testing.assert_close(network(*rows).logits_BT.double(), exact_BT, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dense", [0, 2])
    def test_the_head_exports_for_any_number_of_rows(self, kind: str, dense: int) -> None:
        schema = rich_schema(dense=dense)
        network = network_of(config_of(kind), schema)
        given, other = (_detached(network.inputs(*random_rows(schema, rows))) for rows in (8, 5))
        axis = {0: torch.export.Dim("rows", min=1)}
        shapes = Inputs(*(tuple(axis for _ in part) if isinstance(part, tuple) else axis for part in given))
        program = torch.export.export(network.head, (given,), dynamic_shapes=(shapes,))
        torch.testing.assert_close(program.module()(other), network.head(other))
        assert network.head(other).shape == (5, 2)

    def test_empty_bags_and_histories_give_finite_scores_and_gradients(self, kind: str) -> None:
        schema = rich_schema()
        network = network_of(config_of(kind), schema).train()
        ids_BS, floats_BN = random_rows(schema, 16)
        for feature, end in zip(schema.features, schema.slot_ends, strict=True):
            if feature.dtype == "list<int64>":
                ids_BS[:, end - feature.slots : end] = -1
        logits_BT = network(ids_BS, floats_BN).logits_BT
        logits_BT.sum().backward()
        assert logits_BT.isfinite().all()
        assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)

    def test_values_multiply_what_they_belong_to(self, kind: str) -> None:
        schema = rich_schema()
        network = network_of(config_of(kind), schema)
        ids_BS, floats_BN = random_rows(schema, 16)
        changed_BN = floats_BN.clone()
        changed_BN[:, schema.float_names.index("price:value")] *= 2
        with torch.no_grad():
            difference = network(ids_BS, floats_BN).logits_BT - network(ids_BS, changed_BN).logits_BT
        assert (difference.abs() > 1e-6).any()

    def test_one_field_and_one_task_are_enough(self, kind: str) -> None:
        if kind in SEQUENCE_MODELS:
            pytest.skip("a history and its candidate are two features")
        schema = schema_of(ONE_FIELD.features, dense=2, tasks=tasks_of(kind))
        network = network_of(config_of(kind), schema)
        logits_BT = network(*random_rows(schema, 8)).logits_BT
        assert logits_BT.shape == (8, len(schema.tasks))
        assert logits_BT.isfinite().all()

    def test_settings_survive_json(self, kind: str) -> None:
        config = config_of(kind)
        assert MODELS[kind].model_validate_json(config.model_dump_json()) == config


def test_rows_start_the_same_however_they_are_cut() -> None:
    def drawn(first: int, end: int) -> Tensor:
        rows = torch.ones(end - first, 12)
        init_rows(rows, table="t", first_row=first, vector=8, std=0.1, seed=1)
        return rows

    whole = drawn(0, 150_000)
    torch.testing.assert_close(torch.cat([drawn(0, 65_000), drawn(65_000, 150_000)]), whole, rtol=0, atol=0)
    assert whole[:, 8:].eq(0).all()
    assert whole[:, :8].std() == pytest.approx(0.1, rel=0.01)
    assert not torch.equal(whole[:1000], whole[65_536:66_536])


def test_a_layout_cuts_rows_into_what_a_head_reads(schema: Schema) -> None:
    layout = Layout.of(schema, WideDeepConfig(), dim=8)
    assert layout.widths() == {"user": 12, "item": 12, "pair": 4}
    rows_BSW = torch.arange(2 * 24.0).reshape(2, 2, 12)
    weights_BS = torch.tensor([[100.0], [200.0]])
    found = layout.inputs(rows_BSW, weights_BS, ids_BS=torch.zeros(2, 3, dtype=torch.int64), floats_BN=torch.ones(2, 2))
    assert found.emb_BFK.shape == (2, 2, 8)
    assert found.emb_BFK[0, 1].tolist() == list(range(12, 20))
    assert found.linear_BL.tolist() == [[8, 20, 100], [32, 44, 200]]
    assert found.dense_BN.shape == (2, 2)


def test_bags_are_pooled_by_their_values_and_histories_stay_apart() -> None:
    schema = rich_schema(dense=0)
    layout = Layout.of(schema, config_of("din"), dim=4)
    assert layout.sizes.fields == ("user", "tags", "price", "item")
    assert layout.sizes.sequences == (("history", 4),)
    ids_BS = torch.tensor([[1, 0, 5, 6, -1, 1, 3, 7, 8, -1, -1]])
    floats_BN = torch.tensor([[3.0, 1.0, 0.0, 2.5]])
    rows_BSW = torch.ones(1, layout.vectors, 4) * torch.arange(1.0, layout.vectors + 1)[None, :, None]
    found = layout.inputs(rows_BSW, torch.zeros(1, 0), ids_BS=ids_BS, floats_BN=floats_BN)
    slot = {name: at + 1.0 for at, (name, _) in enumerate(layout.slots)}
    tags = (3 * slot["tags.0"] + 1 * slot["tags.1"]) / 4
    assert found.emb_BFK[0, :, 0].tolist() == [slot["user"], tags, 2.5 * slot["price"], slot["item"]]
    assert found.masks[0].tolist() == [[1, 1, 0, 0]]
    assert found.sequences[0][0, :, 0].tolist() == [slot["history.0"], slot["history.1"], 0, 0]


def test_dlrm_without_dot_products_reads_the_vectors_themselves() -> None:
    schema = rich_schema(dense=0)
    dlrm, deep = (
        network_of(config_of(kind, **rest), schema) for kind, rest in (("dlrm", {"interaction": "cat"}), ("deep", {}))
    )
    deep.head.mlp.load_state_dict(dlrm.head.top.state_dict())
    deep.tables.load_state_dict(dlrm.tables.state_dict())
    rows = random_rows(schema, 8)
    torch.testing.assert_close(dlrm(*rows).logits_BT, deep(*rows).logits_BT)
    with_dense = rich_schema(dense=2)
    network = network_of(config_of("dlrm", interaction="cat"), with_dense)
    ids_BS, floats_BN = random_rows(with_dense, 8)
    changed_BN = floats_BN.clone()
    changed_BN[:, 0] += 1
    assert not torch.equal(network(ids_BS, floats_BN).logits_BT, network(ids_BS, changed_BN).logits_BT)


def test_the_towers_of_esmm_share_the_storage_of_every_table() -> None:
    schema = rich_schema()
    network = network_of(config_of("esmm"), schema)
    tables = list(network.tables.parameters())
    assert len({table.untyped_storage().data_ptr() for table in tables}) == len(tables) == len(network.layout.widths())
    inputs = network.inputs(*random_rows(schema, 32))
    for tower in (network.head.click, network.head.conversion):
        gradients = torch.autograd.grad(tower(inputs).sum(), tables, retain_graph=True)
        assert all(gradient.ne(0).any() for gradient in gradients)
