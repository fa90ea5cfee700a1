"""The factorization machine family against vectors of the published code (tests/golden/*.json say whose)."""

import numpy as np
import torch

from recsys.models.deepfm import DeepFM, DeepFMConfig
from recsys.models.layers import half_squares
from tests.golden.case import Arrays, Case, Field, bce, check, fill_linear, inputs, leaf, load, set_masks

LAYERS = ("mlp0", "mlp1", "deep_out")


def fields_of(z: Arrays) -> list[Field]:
    """Dense [B, F] ids and values of one table."""
    ids, values = z["in/feat_ids"], z["in/feat_vals"]
    return [
        Field(f"f{at}", "all", ids[:, at : at + 1], values[:, at : at + 1], type="field") for at in range(ids.shape[1])
    ]


def build_deepfm(z: Arrays, *, keep: float | list[float] = 1.0) -> Case:
    config = DeepFMConfig(hidden=[6, 3], keep_prob=keep)
    p = {key.removeprefix("w/"): leaf(z[key]) for key in z if key.startswith("w/")}
    none = np.zeros((8, 0))

    def logits() -> torch.Tensor:
        _, given = inputs(config, fields_of(z), vectors={"all": p["fm_v"]}, weights={"all": p["fm_w"]}, dense=none)
        return head(given)[:, 0]

    layout, _ = inputs(config, fields_of(z), vectors={"all": p["fm_v"]}, weights={"all": p["fm_w"]}, dense=none)
    head = DeepFM(config, layout.sizes).double()
    del head.first_order.bias_T
    head.first_order.bias_T = p["fm_bias"]
    linears = [module for module in head.deep.modules() if isinstance(module, torch.nn.Linear)]
    for layer, name in zip(linears, LAYERS, strict=True):
        fill_linear(layer, weight=p[f"Deep-part/{name}/weights"], bias=p[f"Deep-part/{name}/biases"])
    return Case(head, p, logits, lambda: bce(logits(), z["in/labels"]) + 0.01 * half_squares([p["fm_w"], p["fm_v"]]))


def test_deepfm() -> None:
    z = load("deepfm")
    check(build_deepfm(z), z)


def test_deepfm_with_dropout() -> None:
    z = load("deepfm")
    case = build_deepfm(z, keep=[0.5, 0.8])
    set_masks(case.head, [z["train/mask0"], z["train/mask1"]])
    torch.testing.assert_close(case.logits(), torch.tensor(z["train/logit"]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(case.loss(), torch.tensor(z["train/loss"]), rtol=1e-6, atol=1e-6)
