"""Every model of the registry keeps the same contract; golden values come from the published code."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from etl.schema import Schema
from recsys.experiment import Experiment
from recsys.models import MODELS
from recsys.models.deepfm import DeepFM, DeepFMConfig, pairs_B1
from recsys.models.head import Inputs, Sizes
from recsys.models.wide_deep import WideDeep, WideDeepConfig
from recsys.network import Layout, Network, build_network, init_rows

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"needs the golden vectors in {GOLDEN}")


def network_of(experiment: Experiment, schema: Schema) -> Network:
    network = build_network(experiment, schema, table_device="cpu")
    for table, bag in network.tables.embedding_bags.items():
        init_rows(bag.weight.detach(), table=table, first_row=0, vector=bag.weight.shape[1], std=0.5, seed=1)
    return network.eval()


def some_rows(schema: Schema, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    rows = [schema.rows(feature.table) for feature in schema.features]
    ids = [torch.randint(0, count, (size,), generator=generator) for count in rows]
    return torch.stack(ids, dim=1), torch.randn(size, len(schema.dense), generator=generator)


@pytest.mark.parametrize("kind", MODELS)
class TestEveryModel:
    def test_gradients_reach_every_parameter(
        self, kind: str, experiment: Callable[..., Experiment], schema: Schema
    ) -> None:
        network = network_of(experiment(model={"kind": kind} if kind != "wide" else _only("wide")), schema)
        network(*some_rows(schema, 64)).square().sum().backward()
        silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum()]
        assert silent == []

    def test_rows_do_not_see_each_other(self, kind: str, experiment: Callable[..., Experiment], schema: Schema) -> None:
        network = network_of(experiment(model={"kind": kind} if kind != "wide" else _only("wide")), schema)
        ids, dense = some_rows(schema, 16)
        with torch.no_grad():
            alone = torch.cat([network(ids[at : at + 1], dense[at : at + 1]) for at in range(16)])
            torch.testing.assert_close(network(ids, dense), alone, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("dense", [0, 2])
    def test_the_head_exports_for_any_number_of_rows(self, kind: str, dense: int) -> None:
        config = MODELS[kind]()
        layout_linear, layout_fields = (3 if config.linear else 0), (2 if config.vectors else 0)
        head = config.build(Sizes(layout_fields, 8, dense, 2)).eval()

        def inputs(rows: int) -> Inputs:
            shapes = ((rows, layout_fields, 8), (rows, layout_linear), (rows, dense))
            return Inputs(*(torch.randn(shape) for shape in shapes))

        rows_axis = {0: torch.export.Dim("rows", min=2)}
        program = torch.export.export(head, (inputs(8),), dynamic_shapes=(Inputs(rows_axis, rows_axis, rows_axis),))
        given = inputs(5)
        torch.testing.assert_close(program.module()(given), head(given))
        assert head(given).shape == (5, 2)


def _only(kind: str) -> Any:
    """A whole section: `wide` has none of the settings that the test's experiment gives."""
    return MODELS[kind]()


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
    pooled = torch.arange(2 * 28.0).reshape(2, 28)
    found = layout.inputs(pooled, torch.zeros(2, 0))
    assert found.emb_BFK.shape == (2, 2, 8)
    assert found.emb_BFK[0, 1].tolist() == list(range(12, 20))
    assert found.linear_BL[0].tolist() == [8, 20, 24]


def test_pairs_are_the_dot_products_of_all_pairs() -> None:
    emb = torch.randn(3, 4, 5, dtype=torch.float64)
    pairs = [(i, j) for i in range(4) for j in range(i)]
    wanted = sum((emb[:, i] * emb[:, j]).sum(dim=1, keepdim=True) for i, j in pairs)
    torch.testing.assert_close(pairs_B1(emb), wanted)


def _fill(mlp: nn.Module, layers: list[tuple[Any, Any]]) -> None:
    linear = [module for module in mlp.modules() if isinstance(module, nn.Linear)]
    for module, (weight, bias) in zip(linear, layers, strict=True):
        module.weight.data, module.bias.data = torch.tensor(weight).double().T, torch.tensor(bias).double()


@needs_golden
def test_deepfm_equals_the_published_code() -> None:
    z = np.load(GOLDEN / "deepfm.npz")
    head = DeepFM(DeepFMConfig(hidden=[6, 3], keep_prob=1.0), Sizes(5, 4, 0, 1)).double()
    _fill(
        head.deep, [(z[f"w/Deep-part/{n}/weights"], z[f"w/Deep-part/{n}/biases"]) for n in ("mlp0", "mlp1", "deep_out")]
    )
    head.first_order.bias_T.data = torch.tensor(z["w/fm_bias"])
    ids, values = z["in/feat_ids"], torch.tensor(z["in/feat_vals"])
    emb = torch.tensor(z["w/fm_v"][ids]) * values[:, :, None]
    linear = torch.tensor(z["w/fm_w"][ids]) * values
    logits = head(Inputs(emb, linear, torch.zeros(8, 0, dtype=torch.float64)))[:, 0]
    torch.testing.assert_close(logits, torch.tensor(z["out/logit"]), rtol=1e-12, atol=1e-12)


@needs_golden
def test_wide_deep_equals_tensorflows_estimator() -> None:
    z = np.load(GOLDEN / "wide_deep.npz")
    assert json.loads((GOLDEN / "wide_deep.json").read_text())["config"]["combiner"] == "mean"
    head = WideDeep(WideDeepConfig(hidden=[6, 3], keep_prob=1.0), Sizes(5, 4, 2, 1)).double()
    _fill(head.deep, [(z[f"w/w{at}"], z[f"w/b{at}"]) for at in range(3)])
    head.wide.bias_T.data, head.wide.weight_NT.data = (
        torch.tensor(z[f"w/wide_{n}"]).double() for n in ("bias", "dense")
    )
    lengths = z["in/lengths"].reshape(-1)
    bags, values = _bags(lengths, z["in/ids"]), _bags(lengths, z["in/weights"])
    emb = [[_mean(z[f"w/embed_{f}"], bags[f * 8 + row]) for f in range(5)] for row in range(8)]
    linear = [
        [float(z[f"w/wide_{f}"][bags[f * 8 + row], 0] @ values[f * 8 + row]) for f in range(5)] for row in range(8)
    ]
    crosses = [float(z["w/wide_cross"][bag].sum()) for bag in _bags(z["in/cross_lengths"], z["in/cross_ids"])]
    linear_BL = torch.tensor([[*weights, cross] for weights, cross in zip(linear, crosses, strict=True)]).double()
    logits = head(Inputs(torch.tensor(np.array(emb)), linear_BL, torch.tensor(z["in/dense"])))[:, 0]
    torch.testing.assert_close(logits.float(), torch.tensor(z["out/logit"]), rtol=1e-5, atol=1e-6)


def _bags(lengths: Any, ids: Any) -> list[Any]:
    return np.split(ids, np.cumsum(lengths)[:-1])


def _mean(table: Any, bag: Any) -> Any:
    return table[bag].mean(axis=0).astype(np.float64) if len(bag) else np.zeros(table.shape[1])
