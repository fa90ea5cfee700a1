"""The factorization machine family against vectors of the published code (tests/golden/*.json say whose)."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from recsys.models.afm import AFM, AFMConfig
from recsys.models.deepfm import DeepFM, DeepFMConfig
from recsys.models.fm import FM, FMConfig
from recsys.models.fnn import FNN, FNNConfig
from recsys.models.head import Head, Inputs, ModelConfig, Sizes
from recsys.models.layers import Dropout, half_squares, init_head
from recsys.models.linear import FirstOrder
from recsys.models.nfm import NFM, NFMConfig
from recsys.models.pnn import PNN2, PNN1Config, PNN2Config
from recsys.optim import OptimizerSettings
from tests.golden.case import Arrays, Case, Field, bce, check, fill_linear, inputs, leaf, load, padded, set_masks
from tests.golden.trajectory import TRAJECTORIES, check_steps, run_steps

Keeps = float | list[float]
Reader = Callable[[], Inputs]
LAYERS = ("mlp0", "mlp1", "deep_out")
TOWER = {"hidden": [6, 3], "activation": ["relu", "tanh"], "compat": "seed"}
"""The published FNN and PNN of the vectors."""


def fields_of(z: Arrays) -> list[Field]:
    """Dense [B, F] ids and values of one table."""
    ids, values = z["in/feat_ids"], z["in/feat_vals"]
    return [
        Field(f"f{at}", "all", ids[:, at : at + 1], values[:, at : at + 1], type="field") for at in range(ids.shape[1])
    ]


def bags_of(z: Arrays, *, tables: list[str]) -> list[Field]:
    """Jagged ids and values, field after field."""
    lengths_FB = z["in/lengths"]
    ends = lengths_FB.sum(axis=1).cumsum()[:-1]
    ids, values = np.split(z["in/ids"], ends), np.split(z["in/weights"], ends)
    return [
        Field(f"f{at}", table, padded(lengths_FB[at], ids[at], fill=-1), padded(lengths_FB[at], values[at], fill=0))
        for at, table in enumerate(tables)
    ]


def leaves(z: Arrays) -> dict[str, Tensor]:
    """The file's parameters."""
    return {key.removeprefix("w/"): leaf(z[key]) for key in z if key.startswith("w/")}


def reader(
    config: ModelConfig, fields: list[Field], *, vectors: dict[str, Tensor], weights: dict[str, Tensor]
) -> tuple[Sizes, Reader]:
    """The head's sizes, and what looks the tables up as they are then."""
    none = np.zeros((len(fields[0].ids), 0))
    layout, _ = inputs(config, fields, vectors=vectors, weights=weights, dense=none)
    return layout.sizes, lambda: inputs(config, fields, vectors=vectors, weights=weights, dense=none)[1]


def set_bias(first_order: FirstOrder, bias: Tensor) -> None:
    """Makes the head use the leaf itself."""
    del first_order.bias_T
    first_order.bias_T = bias  # type: ignore[assignment]


def fill_layers(module: nn.Module, layers: list[tuple[Tensor, Tensor]]) -> None:
    """Weights [in, out] and biases of the linear layers, in their order."""
    linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    for layer, (weight, bias) in zip(linears, layers, strict=True):
        fill_linear(layer, weight=weight, bias=bias)


def deep_part(p: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(p[f"Deep-part/{name}/weights"], p[f"Deep-part/{name}/biases"]) for name in LAYERS]


def build_fm(z: Arrays) -> Case:
    config, p = FMConfig(), leaves(z)
    sizes, read = reader(config, bags_of(z, tables=["all"] * 5), vectors={"all": p["v"]}, weights={"all": p["w"]})
    head = FM(sizes).double()
    set_bias(head.first_order, p["b"])

    def loss() -> Tensor:
        penalty = head.activation_penalty_B(read(), l2=0.02, linear_l2=0.03).sum()
        return bce(head(read())[:, 0], z["in/labels"]) + penalty

    return Case(head, p, lambda: head(read())[:, 0], loss)


def build_tower(z: Arrays, config: FNNConfig | PNN1Config | PNN2Config) -> Case:
    """FNN, PNN1 or PNN2, with their layers' L2 and that of the pooled vectors."""
    p = leaves(z)
    tables = [f"embed_{at}" for at in range(5)]
    sizes, read = reader(config, bags_of(z, tables=tables), vectors={t: p[t] for t in tables}, weights={})
    head = config.build(sizes).double()
    fill_layers(head, [(p[f"w{at}"], p[f"b{at}"]) for at in range(3)])
    if "kernel" in p:
        del head.kernel
        head.kernel = p["kernel"].transpose(0, 1) if p["kernel"].dim() == 3 else p["kernel"]  # ours is [P, K, K]

    def loss() -> Tensor:
        penalty = head.activation_penalty_B(read(), l2=0.02, linear_l2=0.0).sum()
        layers = [l2 * half_squares([p[f"w{at}"]]) for at, l2 in enumerate((0.01, 0.03, 0.05))]
        return bce(head(read())[:, 0], z["in/labels"]) + penalty + torch.stack(layers).sum()

    return Case(head, p, lambda: head(read())[:, 0], loss)


def build_fnn(z: Arrays, *, keep: Keeps = 1.0) -> Case:
    config = FNNConfig.model_validate(TOWER | {"keep_prob": keep})
    return build_tower(z, config)


def build_pnn1(z: Arrays, *, keep: Keeps = 1.0) -> Case:
    config = PNN1Config.model_validate(TOWER | {"keep_prob": keep})
    return build_tower(z, config)


def build_pnn2(z: Arrays, *, keep: Keeps = 1.0, kernel: str = "mat") -> Case:
    config = PNN2Config.model_validate(TOWER | {"keep_prob": keep, "kernel": kernel})
    return build_tower(z, config)


def build_deepfm(z: Arrays, *, keep: Keeps = 1.0) -> Case:
    config, p = DeepFMConfig(hidden=[6, 3], keep_prob=keep), leaves(z)
    sizes, read = reader(config, fields_of(z), vectors={"all": p["fm_v"]}, weights={"all": p["fm_w"]})
    head = DeepFM(config, sizes).double()
    set_bias(head.first_order, p["fm_bias"])
    fill_layers(head.deep, deep_part(p))
    return table_l2_case(head, z, p=p, read=read, tables=["fm_w", "fm_v"])


def build_nfm(z: Arrays, *, keep: Keeps = 1.0, bi_keep: float = 1.0) -> Case:
    config, p = NFMConfig(hidden=[6, 3], keep_prob=keep, bi_keep=bi_keep, compat="seed"), leaves(z)
    sizes, read = reader(config, fields_of(z), vectors={"all": p["emb"]}, weights={"all": p["linear"]})
    head = NFM(config, sizes).double()
    set_bias(head.first_order, p["bias"])
    fill_layers(head.deep, deep_part(p))
    return table_l2_case(head, z, p=p, read=read, tables=["linear", "emb"])


def build_afm(z: Arrays, *, attention_keep: float = 1.0, pooled_keep: float = 1.0) -> Case:
    """The published score has a bias, which the softmax cancels; ours has none."""
    p = leaves(z)
    config = AFMConfig(attention=[3], attention_keep=attention_keep, pooled_keep=pooled_keep, projection_bias=True)
    sizes, read = reader(config, fields_of(z), vectors={"all": p["emb"]}, weights={"all": p["linear"]})
    head = AFM(config, sizes).double()
    set_bias(head.first_order, p["bias"])
    attention, out = "Attention-part", "Attention-based-Pooling/deep_out"
    fill_layers(head.attention, [(p[f"{attention}/mlp0/weights"], p[f"{attention}/mlp0/biases"])])
    fill_linear(head.score, weight=p[f"{attention}/attention_out/weights"], bias=None)
    fill_linear(head.projection, weight=p[f"{out}/weights"], bias=p[f"{out}/biases"])
    return table_l2_case(head, z, p=p, read=read, tables=["linear", "emb"])


def table_l2_case(head: Head, z: Arrays, *, p: dict[str, Tensor], read: Reader, tables: list[str]) -> Case:
    """A case whose loss regularises whole tables."""

    def loss() -> Tensor:
        return bce(head(read())[:, 0], z["in/labels"]) + 0.01 * half_squares([p[name] for name in tables])

    return Case(head, p, lambda: head(read())[:, 0], loss)


BUILDERS: dict[str, Callable[[Arrays], Case]] = {
    "fm": build_fm,
    "fnn": build_fnn,
    "pnn1": build_pnn1,
    "pnn2": build_pnn2,
    "pnn2_vec": lambda z: build_pnn2(z, kernel="vec"),
    "pnn2_num": lambda z: build_pnn2(z, kernel="num"),
    "deepfm": build_deepfm,
    "nfm": build_nfm,
    "afm": build_afm,
}
DROPPING: dict[str, Callable[[Arrays], Case]] = {
    "fnn": lambda z: build_fnn(z, keep=[0.5, 0.8, 0.75]),
    "pnn1": lambda z: build_pnn1(z, keep=[0.5, 0.8, 0.75]),
    "pnn2": lambda z: build_pnn2(z, keep=[0.5, 0.8, 0.75]),
    "deepfm": lambda z: build_deepfm(z, keep=[0.5, 0.8]),
    "nfm": lambda z: build_nfm(z, keep=[0.8, 0.9], bi_keep=0.5),
    "afm": lambda z: build_afm(z, attention_keep=0.5, pooled_keep=0.8),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_the_published_logits_loss_and_gradients(name: str) -> None:
    z = load(name)
    case = BUILDERS[name](z)
    check(case, z)
    torch.testing.assert_close(case.logits().sigmoid(), torch.tensor(z["out/prob"]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("optimizer", TRAJECTORIES)
@pytest.mark.parametrize("name", ["deepfm", "nfm", "afm"])
def test_the_published_five_steps(name: str, optimizer: str) -> None:
    z, prefix = load(name), f"traj/{optimizer}"
    case = BUILDERS[name](z)
    settings = OptimizerSettings.model_validate(TRAJECTORIES[optimizer] | {"learning_rate": float(z[f"{prefix}/lr"])})
    check_steps(run_steps(case, lambda _: settings, steps=5), case, z, prefix)


@pytest.mark.parametrize("name", DROPPING)
def test_the_published_training_mode(name: str) -> None:
    z = load(name)
    case = DROPPING[name](z)
    masks = [z[key] for key in sorted(z) if key.startswith("train/mask")]
    if name == "afm":  # the file has the pooled vector's first
        masks = [masks[1][:, :, 0], masks[0]]
    set_masks(case.head, masks)
    torch.testing.assert_close(case.logits(), torch.tensor(z["train/logit"]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(case.loss(), torch.tensor(z["train/loss"]), rtol=1e-6, atol=1e-6)


def some_inputs(fields: int, *, rows: int = 6, dim: int = 4) -> Inputs:
    """One id a field, one `linear_only` feature and a dense input."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((rows, fields, dim), (rows, fields + 1), (rows, 1))
    emb_BFK, linear_BL, dense_BN = (torch.randn(shape, generator=generator) for shape in shapes)
    return Inputs(emb_BFK, linear_BL, dense_BN, emb_BFK)


def some_sizes(fields: int) -> Sizes:
    return Sizes(tuple(f"f{at}" for at in range(fields)), 4, 1, ("click", "buy"))


def test_fnn_sees_the_weight_of_each_field_before_its_vector() -> None:
    config = FNNConfig(hidden=[5], include_linear=True)
    assert config.linear and not FNNConfig().linear
    given = some_inputs(2)
    head = FNN(config, some_sizes(2))
    parts = [given.linear_BL[:, :1], given.emb_BFK[:, 0], given.linear_BL[:, 1:2], given.emb_BFK[:, 1], given.dense_BN]
    torch.testing.assert_close(head(given), head.mlp(torch.cat(parts, dim=1)))
    penalty_B = head.activation_penalty_B(given, l2=2.0, linear_l2=2.0)
    torch.testing.assert_close(penalty_B, torch.cat(parts[:4], dim=1).square().sum(dim=1))


def keeps_of(module: nn.Module) -> list[float]:
    return [layer.keep_prob for layer in module.modules() if isinstance(layer, Dropout)]


def test_only_the_published_fnn_drops_its_logit() -> None:
    assert keeps_of(FNNConfig(hidden=[3, 2], keep_prob=0.5).mlp(4, out=1)) == [0.5, 0.5]
    assert keeps_of(FNNConfig(hidden=[3, 2], keep_prob=0.5, compat="seed").mlp(4, out=1)) == [0.5, 0.5, 0.5]
    assert keeps_of(FNNConfig(hidden=[3, 2], keep_prob=[0.5, 0.6], compat="seed").mlp(4, out=1)) == [0.5, 0.6]


@pytest.mark.parametrize(("compat", "keep_prob"), [("none", [0.5] * 3), ("seed", [0.5] * 4), ("seed", [0.5])])
def test_a_keep_prob_too_many_or_too_few_is_refused(compat: str, keep_prob: list[float]) -> None:
    with pytest.raises(ValidationError, match=rf"'keep_prob' has {len(keep_prob)} values for 2 hidden layers"):
        PNN2Config.model_validate({"hidden": [3, 2], "keep_prob": keep_prob, "compat": compat})


def test_nfm_uses_every_keep_prob_where_it_stands() -> None:
    config = NFMConfig(hidden=[3, 2], keep_prob=[0.6, 0.7], bi_keep=0.5)
    assert keeps_of(NFM(config, some_sizes(2))) == [0.5, 0.6, 0.7]
    seed = NFMConfig(hidden=[3, 2], keep_prob=0.6, bi_keep=0.5, compat="seed")
    assert keeps_of(NFM(seed, some_sizes(2))) == [0.5, 0.5, 0.6]


@pytest.mark.parametrize(("kernel", "axes"), [("mat", 4 + 190 + 4), ("vec", 190 + 4), ("num", 190 + 1)])
def test_the_published_start_of_kernels(kernel: str, axes: int) -> None:
    head = PNN2(PNN2Config.model_validate({"kernel": kernel}), some_sizes(20))
    init_head(head, torch.Generator().manual_seed(3))
    bound = (6 / axes) ** 0.5
    sizes = head.kernel.detach().abs()
    assert 0.95 * bound < sizes.max() <= bound
    assert sizes.mean().item() == pytest.approx(bound / 2, rel=0.1)


def afm(fields: int, *, mask_empty: bool) -> AFM:
    head = AFM(AFMConfig(mask_empty=mask_empty, attention_l2=0.5), some_sizes(fields))
    init_head(head, torch.Generator().manual_seed(4))
    return head


def test_an_empty_field_gets_no_attention() -> None:
    full = some_inputs(3)
    emb_BFK = torch.cat([full.emb_BFK[:, :2], torch.zeros(6, 1, 4), full.emb_BFK[:, 2:]], dim=1)
    with_empty = full._replace(emb_BFK=emb_BFK)
    torch.testing.assert_close(afm(4, mask_empty=True)(with_empty), afm(3, mask_empty=False)(full))
    assert not torch.allclose(afm(4, mask_empty=False)(with_empty), afm(3, mask_empty=False)(full))


def test_attention_without_any_pair_is_zero_and_has_finite_gradients() -> None:
    given, head = some_inputs(3), afm(3, mask_empty=True)
    emb_BFK = torch.zeros_like(given.emb_BFK).requires_grad_()
    logits_BT = head(given._replace(emb_BFK=emb_BFK))
    assert head.softmax(torch.randn(6, 3), emb_BFK).eq(0).all()
    torch.testing.assert_close(logits_BT, head.first_order(given.linear_BL, given.dense_BN))
    logits_BT.sum().backward()
    grads = [p.grad for p in (emb_BFK, *head.parameters()) if p.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)


def test_attention_l2_is_of_the_attention_layers_weights() -> None:
    head = afm(3, mask_empty=False)
    penalty, weights = (
        head.penalty(),
        [layer.weight for layer in head.attention.modules() if isinstance(layer, nn.Linear)],
    )
    assert penalty is not None
    torch.testing.assert_close(penalty, 0.5 * half_squares(weights))
    assert AFM(AFMConfig(), some_sizes(3)).penalty() is None
