"""The deep family against vectors of the published code (tests/golden/*.json say whose)."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from recsys.models.dcn import DCN, DCNConfig
from recsys.models.dcnv2 import DCNV2, DCNV2Config
from recsys.models.deep import DeepConfig
from recsys.models.deep_crossing import DeepCrossing, DeepCrossingConfig
from recsys.models.head import Inputs, ModelConfig, Sizes
from recsys.models.layers import batch_norm, half_squares, init_head
from recsys.models.wide import Wide, WideConfig
from recsys.models.wide_deep import WideDeep, WideDeepConfig
from recsys.optim import OptimizerSettings
from tests.golden.case import (
    FOLDER,
    Arrays,
    Case,
    Field,
    bce,
    check,
    fill_linear,
    inputs,
    leaf,
    load,
    padded,
    set_masks,
)
from tests.golden.trajectory import TRAJECTORIES, check_steps, run_steps


def check_prob(case: Case, z: Arrays) -> None:
    torch.testing.assert_close(case.logits().sigmoid(), torch.tensor(z["out/prob"]), rtol=1e-6, atol=1e-6)


def leaves(z: Arrays) -> dict[str, Tensor]:
    return {key.removeprefix("w/"): leaf(z[key]) for key in z if key.startswith("w/")}


def replace(module: nn.Module, name: str, value: Tensor) -> None:
    """Makes the module use a leaf in place of its parameter."""
    delattr(module, name)
    setattr(module, name, value)


def linears(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def build_dcn(z: Arrays, *, keep: float | list[float] = 1.0) -> Case:
    config = DCNConfig(hidden=[6, 3], keep_prob=keep, cross_layers=2, cross_l2=0.01)
    p = leaves(z)
    ids, values = z["in/feat_ids"], z["in/feat_vals"]
    fields = [
        Field(f"f{at}", "emb", ids[:, at : at + 1], values[:, at : at + 1], type="field") for at in range(ids.shape[1])
    ]

    def given() -> tuple[Sizes, Inputs]:
        layout, found = inputs(config, fields, vectors={"emb": p["emb"]}, weights={}, dense=np.zeros((8, 0)))
        return layout.sizes, found

    head = DCN(config, given()[0]).double()
    replace(head.cross, "weight_CD", p["cross_w"])
    replace(head.cross, "bias_CD", p["cross_b"])
    for at, layer in enumerate(linears(head.deep)):
        fill_linear(layer, weight=p[f"Deep-Network/mlp{at}/weights"], bias=p[f"Deep-Network/mlp{at}/biases"])
    fill_linear(head.out, weight=p["DCN-out/out_layer/weights"], bias=p["DCN-out/out_layer/biases"])

    def logits() -> Tensor:
        return head(given()[1])[:, 0]

    def loss() -> Tensor:
        penalty = head.penalty()
        assert penalty is not None
        return bce(logits(), z["in/labels"]) + penalty + 0.01 * half_squares([p["emb"]])

    return Case(head, p, logits, loss)


def build_dcnv2(z: Arrays) -> Case:
    """The published code adds first-order weights of the ids to the logit; here the case does."""
    config = DCNV2Config(hidden=[6, 3], cross_layers=2)
    p = leaves(z)
    ids = z["in/local_ids"]
    fields = [Field(f"f{at}", f"f{at}", ids[:, at : at + 1], type="field") for at in range(ids.shape[1])]
    tables = {field.name: p[f"embedding_dict.{field.name}.weight"] for field in fields}

    def given() -> tuple[Sizes, Inputs]:
        layout, found = inputs(config, fields, vectors=tables, weights={}, dense=z["in/dense"])
        return layout.sizes, found

    head = DCNV2(config, given()[0]).double()
    for at, layer in enumerate(linears(head.crosses)):
        fill_linear(layer, weight=p["crossnet.kernels"][at].T, bias=p["crossnet.bias"][at, :, 0])
    for at, layer in enumerate(linears(head.deep)):
        fill_linear(layer, weight=p[f"dnn.linears.{at}.weight"].T, bias=p[f"dnn.linears.{at}.bias"])
    assert head.out is not None
    fill_linear(head.out, weight=p["dnn_linear.weight"].T, bias=p["out.bias"])

    def logits() -> Tensor:
        weights = [p[f"linear_model.embedding_dict.f{at}.weight"][ids[:, at], 0] for at in range(ids.shape[1])]
        return head(given()[1])[:, 0] + torch.stack(weights).sum(dim=0)

    return Case(head, p, logits, lambda: bce(logits(), z["in/labels"]))


def bags(z: Arrays, prefix: str, *, weighted: bool, combiner: str = "sum", linear_only: bool = False) -> list[Field]:
    """The five jagged fields of a file, one table each."""
    ends = np.cumsum(z["in/lengths"].sum(axis=1))[:-1]
    fields = []
    parts = zip(z["in/lengths"], np.split(z["in/ids"], ends), np.split(z["in/weights"], ends), strict=True)
    for at, (lengths, ids, values) in enumerate(parts):
        fields.append(
            Field(
                f"{prefix}{at}",
                f"{prefix}{at}",
                padded(lengths, ids, fill=-1),
                padded(lengths, values, fill=0) if weighted else None,
                combiner=combiner,
                linear_only=linear_only,
            )
        )
    return fields


def build_deep_crossing(z: Arrays) -> Case:
    config = DeepCrossingConfig(hidden=[7, 5])
    p = leaves(z)
    fields = bags(z, "embed_", weighted=True)
    tables = {field.table: p[field.table] for field in fields}

    def given() -> tuple[Sizes, Inputs]:
        layout, found = inputs(config, fields, vectors=tables, weights={}, dense=z["in/dense"])
        return layout.sizes, found

    head = DeepCrossing(config, given()[0]).double()
    replace(head, "bias_FK", torch.stack([p[f"embed_bias_{at}"] for at in range(5)]))
    for at, layer in enumerate(linears(head.units)):
        unit, part = divmod(at, 2)
        fill_linear(layer, weight=p[f"unit{unit}/W{part}"], bias=p[f"unit{unit}/b{part}"])
    fill_linear(head.out, weight=p["out/W"], bias=p["out/b"])

    def logits() -> Tensor:
        return head(given()[1])[:, 0]

    return Case(head, p, logits, lambda: bce(logits(), z["in/labels"]))


def build_canned(z: Arrays, config: ModelConfig) -> Case:
    """TensorFlow's estimators: weighted sums of first-order weights, unweighted means of vectors."""
    p = leaves(z)
    fields = bags(z, "embed_", weighted=False, combiner="mean") if config.vectors else []
    if config.linear:
        crosses = padded(z["in/cross_lengths"], z["in/cross_ids"], fill=-1)
        fields += bags(z, "wide_", weighted=True, linear_only=True)
        fields.append(Field("cross", "wide_cross", crosses, linear_only=True))
    weights = {field.table: p[field.table] for field in fields if field.table.startswith("wide")}
    vectors = {field.table: p[field.table] for field in fields if field.table.startswith("embed")}
    vectors |= {table: torch.zeros(len(weight), 4, dtype=torch.float64) for table, weight in weights.items()}

    def given() -> tuple[Sizes, Inputs]:
        layout, found = inputs(config, fields, vectors=vectors, weights=weights, dense=z["in/dense"])
        return layout.sizes, found

    head = config.build(given()[0]).double()
    for at, layer in enumerate(linears(head)):
        fill_linear(layer, weight=p[f"w{at}"], bias=p[f"b{at}"])
    if config.linear:
        assert isinstance(head, Wide | WideDeep)
        first_order = head.first_order if isinstance(head, Wide) else head.wide
        replace(first_order, "bias_T", p["wide_bias"])
        replace(first_order, "weight_NT", p["wide_dense"])

    def logits() -> Tensor:
        return head(given()[1])[:, 0]

    return Case(head, p, logits, lambda: bce(logits(), z["in/labels"]))


def test_dcn() -> None:
    z = load("dcn")
    case = build_dcn(z)
    check(case, z)
    check_prob(case, z)


def test_dcn_with_dropout() -> None:
    z = load("dcn")
    case = build_dcn(z, keep=[0.5, 0.8])
    set_masks(case.head, [z["train/mask0"], z["train/mask1"]])
    torch.testing.assert_close(case.logits(), torch.tensor(z["train/logit"]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(case.loss(), torch.tensor(z["train/loss"]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_dcn_learns_as_published(name: str) -> None:
    z = load("dcn")
    settings = OptimizerSettings(learning_rate=float(z[f"traj/{name}/lr"]), **TRAJECTORIES[name])
    case = build_dcn(z)
    check_steps(run_steps(case, lambda _: settings, steps=5), case, z, f"traj/{name}")


def test_dcnv2() -> None:
    z = load("dcnv2_deepctr")
    case = build_dcnv2(z)
    check(case, z)
    check_prob(case, z)


def test_deep_crossing() -> None:
    z = load("deep_crossing")
    check(build_deep_crossing(z), z)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("deep", DeepConfig(hidden=[6, 3])),
        ("wide", WideConfig()),
        ("wide_deep", WideDeepConfig(hidden=[6, 3])),
    ],
)
def test_canned_estimators(name: str, config: ModelConfig) -> None:
    z = load(name)
    check(build_canned(z, config), z, atol=1e-6)


def test_wide_and_deep_learns_as_published() -> None:
    z = load("wide_deep")
    wide = OptimizerSettings(optimizer="ftrl", learning_rate=0.2, accumulator_start=0.1)
    deep = OptimizerSettings(optimizer="adagrad", learning_rate=0.05, accumulator_start=0.1, eps=0.0)
    case = build_canned(z, WideDeepConfig(hidden=[6, 3]))
    tables = {name for name in case.parameters if name.startswith(("wide_", "embed_"))} - {"wide_bias", "wide_dense"}
    losses = run_steps(case, lambda name: wide if name.startswith("wide") else deep, steps=5, touched=tables)
    check_steps(losses, case, z, "traj")


def test_batch_norm() -> None:
    z = load("batchnorm")
    norm = batch_norm(3)
    norm.load_state_dict({"weight": torch.tensor(z["in/gamma"]), "bias": torch.tensor(z["in/beta"])}, strict=False)
    for at, batch in enumerate(z["in/x"]):
        torch.testing.assert_close(norm(torch.tensor(batch)), torch.tensor(z["out/train"][at]), rtol=1e-5, atol=1e-6)
        for ours, name in ((norm.running_mean, "moving_mean"), (norm.running_var, "moving_variance")):
            torch.testing.assert_close(ours, torch.tensor(z[f"out/{name}"][at]), rtol=1e-5, atol=1e-6)
    out = norm.eval()(torch.tensor(z["in/x"][0]))
    torch.testing.assert_close(out, torch.tensor(z["out/eval"]), rtol=1e-5, atol=1e-6)


def test_initial_cross_weights() -> None:
    values = json.loads((FOLDER / "init.json").read_text())["values"]["glorot_normal [L,D] (DCN cross_w)"]
    layers, width = values["shape"]
    sizes = Sizes(tuple(map(str, range(width // 4))), 4, 0, ("y",))
    head = DCN(DCNConfig(cross_layers=layers, cross_bias_init="glorot", hidden=[2]), sizes)
    init_head(head, torch.Generator().manual_seed(1))
    for drawn in (head.cross.weight_CD, head.cross.bias_CD):
        assert drawn.std().item() == pytest.approx(values["measured_std"], rel=0.01)
        assert drawn.abs().max().item() == pytest.approx(values["truncation"], rel=1e-3)
        assert drawn.abs().max().item() <= values["truncation"] * (1 + 1e-6)
    head = DCN(DCNConfig(cross_layers=layers, hidden=[2]), sizes)
    init_head(head, torch.Generator().manual_seed(1))
    assert head.cross.weight_CD.abs().sum() > 0 and not head.cross.bias_CD.any()


def test_initial_linear_weights() -> None:
    values = json.loads((FOLDER / "init.json").read_text())["values"]["fully_connected weights (xavier_initializer)"]
    layer = nn.Linear(*values["shape"])
    init_head(layer, torch.Generator().manual_seed(1))
    assert layer.weight.std().item() == pytest.approx(values["measured_std"], rel=0.01)
    assert layer.weight.abs().max().item() == pytest.approx(values["expected_bound"], rel=1e-3)
    assert layer.weight.abs().max().item() <= values["expected_bound"] * (1 + 1e-6)
    assert not layer.bias.any()
