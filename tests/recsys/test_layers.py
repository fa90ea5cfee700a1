"""Layers that several heads share."""

import pytest
import torch

from recsys.models.layers import Dropout
from recsys.models.linear import Linear


@pytest.mark.parametrize("keep_prob", [0.05, 0.5, 0.8, 0.9999])
def test_dropout_keeps_its_share_of_every_place_and_scales_it(keep_prob: float) -> None:
    torch.manual_seed(1)
    layer, x = Dropout(keep_prob).train(), torch.full((40_001, 7), 3.0)
    y = layer(x)
    kept = y != 0
    deviation = (keep_prob * (1 - keep_prob) / len(x)) ** 0.5
    assert (kept.double().mean(dim=0) - keep_prob).abs().max() < 5 * deviation
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 3.0 / keep_prob))


def test_places_are_dropped_independently() -> None:
    """Four neighbours come from one 64-bit number."""
    torch.manual_seed(2)
    kept = (Dropout(0.5).train()(torch.ones(50_000, 16)) != 0).double()
    correlation = torch.corrcoef(kept.T) - torch.eye(16)
    assert correlation.abs().max() < 5 / len(kept) ** 0.5
    rows = torch.corrcoef(torch.stack([kept[:-1, 0], kept[1:, 0]]))[0, 1]
    assert abs(rows) < 5 / len(kept) ** 0.5


def test_a_gradient_passes_where_values_do() -> None:
    torch.manual_seed(3)
    x = torch.randn(64, 9, dtype=torch.float64, requires_grad=True)
    y = Dropout(0.6).train()(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach() / x.detach())


def test_one_seed_gives_one_mask_and_evaluation_none() -> None:
    layer, x = Dropout(0.7), torch.randn(33, 5)
    masks = []
    for _ in range(2):
        torch.manual_seed(4)
        masks.append(layer.train()(x))
    assert torch.equal(*masks)
    assert layer.eval()(x) is x


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_of_odd_width_has_the_gradients_of_torch(bias: bool) -> None:
    torch.manual_seed(0)
    ours, x_BD = Linear(13, 5, bias=bias), torch.randn(7, 13, requires_grad=True)
    theirs, y_BD = torch.nn.Linear(13, 5, bias=bias), x_BD.detach().clone().requires_grad_()
    theirs.load_state_dict(ours.state_dict())
    for layer, inputs in ((ours, x_BD), (theirs, y_BD)):
        layer(inputs).square().sum().backward()
    assert type(ours(x_BD).grad_fn) is not type(theirs(y_BD).grad_fn)  # else nothing of ours was run
    assert x_BD.grad is not None and y_BD.grad is not None
    torch.testing.assert_close(x_BD.grad, y_BD.grad)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
