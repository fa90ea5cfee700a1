"""Training with the dense part as one program: made once, of the same numbers within rounding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from etl.faults import Fault
from recsys.compiled import compile_dense
from recsys.models import linear
from recsys.models.linear import Linear, Logits
from recsys.network import build_network
from recsys.parallel.world import open_world
from tests.recsys.conftest import SCHEMA, experiment
from tests.recsys.test_learner import STEP_ROWS, learnt

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), ("bf16", 0.02)])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_compiled_dense_part_learns_the_same(dataset: Path, accumulate: int, precision: str, limit: float) -> None:
    """Also of a last step that copies fill up; a second shape would be a second program."""
    torch._dynamo.reset()
    counters.clear()
    settings: dict[str, Any] = {"batch_size": STEP_ROWS // accumulate, "accumulate": accumulate, "clip_norm": 0.05}
    settings["precision"] = precision
    plain, compiled = (
        experiment(train=settings | {"compile": on}, model={"kind": "deepfm", "keep_prob": 1.0}) for on in (False, True)
    )
    with open_world("cpu") as world:
        (wanted, losses), (found, others) = (learnt(e, SCHEMA, data=dataset, world=world) for e in (plain, compiled))
    assert others == pytest.approx(losses, abs=limit)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=limit, msg=name)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("outputs", [1, 2, 5])
def test_few_outputs_are_those_of_a_matrix_product(outputs: int) -> None:
    torch._dynamo.reset()
    layer, x_BD = Logits(40, outputs), torch.randn(64, 40, requires_grad=True)
    found = []
    for run in (layer, torch.compile(layer)):
        answers_BT = run(x_BD)
        found.append((answers_BT, *torch.autograd.grad(answers_BT.square().sum(), [x_BD, *layer.parameters()])))
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain)


@pytest.mark.parametrize("shape", [(64, 40), (61, 40), (6, 8, 40)])
def test_a_bias_apart_from_its_product_in_bf16_is_the_same_layer(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside float32; inputs and weights are exact in bf16, so that what is left are roundings of the outputs."""
    torch._dynamo.reset()
    monkeypatch.setattr(linear, "_LARGE", 0)
    layer = Linear(40, 24)
    layer.weight.data, x = layer.weight.data.bfloat16().float(), torch.randn(*shape).bfloat16().float()
    wanted = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.compile(layer)(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=0.02)
    gradient = torch.randn(*wanted.shape).bfloat16()
    ours, plain = (torch.autograd.grad(y, [layer.weight, layer.bias], gradient.to(y.dtype)) for y in (found, wanted))
    torch.testing.assert_close(ours[0], plain[0], rtol=0.01, atol=0.02)
    torch.testing.assert_close(ours[1], plain[1], rtol=0, atol=1e-5)  # torch's own way rounds it to bf16


def test_a_machine_without_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    network = build_network(experiment(), SCHEMA, table_device="meta")
    with pytest.raises(Fault, match="no C\\+\\+ compiler 'no-such-compiler'"):
        compile_dense(network, device="cpu")
