"""DIN and ESMM against vectors of published code (tests/golden/*.json say whose), and laws of the heads beside them."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from recsys.models import MODELS
from recsys.models.bst import BST, BSTConfig
from recsys.models.deep import DeepConfig
from recsys.models.deepfm import DeepFMConfig
from recsys.models.din import DIN, DINConfig
from recsys.models.esmm import ESMM, ESMMConfig
from recsys.models.head import Head, Inputs, ModelConfig, Sizes
from recsys.models.histories import AttentionPair
from recsys.models.layers import Dice, half_squares, init_head
from recsys.models.mmoe import MMoE, MMoEConfig
from recsys.models.ple import PLE, PLEConfig
from recsys.models.tower import Tower
from recsys.models.wide import WideConfig
from recsys.optim import OptimizerSettings, start_states, state_count, update
from tests.golden.case import Arrays, Case, Field, bce, check, fill_linear, inputs, leaf, load, padded

CANDIDATE = AttentionPair(query=["item", "cate"], keys=["hist_item", "hist_cate"])


class AffineDice(Dice):
    """A Dice whose standardised inputs are scaled and shifted by weights, as DeepCTR's is; no model here has one."""

    def __init__(self, alpha_D: Tensor, *, weight_D: Tensor, bias_D: Tensor, mean: Any, var: Any) -> None:
        super().__init__(len(alpha_D))
        self.double()
        del self.alpha_D
        self.alpha_D = alpha_D
        self.weight_D, self.bias_D = weight_D, bias_D
        self.norm.running_mean, self.norm.running_var = torch.tensor(mean), torch.tensor(var)

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        mean_D, var_D = self.running()
        p = torch.sigmoid(self.weight_D * (x - mean_D) / torch.sqrt(var_D + self.norm.eps) + self.bias_D)
        return p * x + (1 - p) * self.alpha_D * x


def build_din(z: Arrays, *, normalise: str, padding_counts: bool = False) -> Case:
    """`padding_counts`: an empty history is read as one full of id 0, which DeepCTR's softmax makes of it."""
    config = DINConfig(
        attention=[CANDIDATE],
        attention_hidden=[5, 3],
        normalise=normalise,
        hidden=[6, 3],
    )
    p = {key.removeprefix("w/"): leaf(z[key]) for key in z if key.startswith("w/") and "running" not in key}
    lengths_B1 = z["in/seq_length"][:, None]
    lengths_B1 = np.where((lengths_B1 == 0) & padding_counts, 6, lengths_B1)
    fields = [Field(name, name, z[f"in/{name}"][:, None], type="field") for name in ("user", "item", "cate")]
    for name in ("item", "cate"):
        ids_BL = np.where(np.arange(6) < lengths_B1, z[f"in/hist_{name}"], -1)
        fields.append(Field(f"hist_{name}", name, ids_BL, type="sequence"))
    vectors = {name: p[f"embedding_dict.{name}.weight"] for name in ("user", "item", "cate")}

    def logits() -> Tensor:
        return head(inputs(config, fields, vectors=vectors, weights={}, dense=z["in/score"][:, None])[1])[:, 0]

    layout, _ = inputs(config, fields, vectors=vectors, weights={}, dense=z["in/score"][:, None])
    head = config.build(layout.sizes).double()
    assert isinstance(head, DIN)
    unit, local = head.units["pair0"], "attention.local_att"
    for at, linear in enumerate(unit.linears):
        name = f"{local}.dnn.linears.{at}"
        fill_linear(linear, weight=p[f"{name}.weight"].T, bias=p[f"{name}.bias"])
        name = f"{local}.dnn.activation_layers.{at}"
        mean, var = z[f"w/{name}.bn.running_mean"], z[f"w/{name}.bn.running_var"]
        weight_D, bias_D = p[f"{name}.bn.weight"], p[f"{name}.bn.bias"]
        unit.activations[at] = AffineDice(
            p[f"{name}.alpha"].flatten(), weight_D=weight_D, bias_D=bias_D, mean=mean, var=var
        )
    bias = p[f"{local}.dense.bias"] if normalise == "none" else None
    fill_linear(unit.score, weight=p[f"{local}.dense.weight"].T, bias=bias)
    tower = [module for module in head.deep.modules() if isinstance(module, nn.Linear)]
    for at, linear in enumerate(tower[:2]):
        fill_linear(linear, weight=p[f"dnn.linears.{at}.weight"].T, bias=p[f"dnn.linears.{at}.bias"])
    fill_linear(tower[2], weight=p["dnn_linear.weight"].T, bias=p["out.bias"])
    return Case(head, p, logits, lambda: bce(logits(), z["in/labels"]))


ESMM_FIELDS = ("u_cat", "u_shop", "u_brand", "u_int", "a_cat", "a_shop", "a_brand", "a_int")


def esmm_fields(z: Arrays) -> list[Field]:
    """In the order in which the original lays their vectors side by side."""
    fields = [Field(f"f{at}", "all", z["in/feat_ids"][:, at : at + 1], type="field") for at in range(3)]
    for name in ESMM_FIELDS:
        if f"in/{name}ids" in z:
            fields.append(Field(name, "all", z[f"in/{name}ids"][:, None], type="field"))
            continue
        lengths_B = z[f"in/{name}_lengths"]
        ids_BL = padded(lengths_B, z[f"in/{name}_ids"], fill=-1)
        key = f"in/{name}_vals"
        fields.append(Field(name, "all", ids_BL, padded(lengths_B, z[key], fill=0) if key in z else None))
    return fields


def build_esmm(z: Arrays) -> Case:
    """Logits are those of the click, of both, and of the conversion after it."""
    config = ESMMConfig(click="t0", conversion="t1", post_click="t2", tower=DeepConfig(hidden=[6, 3]))
    p = {key.removeprefix("w/"): leaf(z[key]) for key in z if key.startswith("w/")}
    fields, none = esmm_fields(z), np.zeros((8, 0))

    def logits() -> Tensor:
        out_BT: Tensor = head(inputs(config, fields, vectors={"all": p["embeddings"]}, weights={}, dense=none)[1])
        return out_BT

    def loss() -> Tensor:
        click_B, both_B, _ = logits().unbind(dim=1)
        regular = 0.01 * half_squares([p["embeddings"]])
        return 0.3 * bce(click_B, z["in/y"]) + 0.7 * bce(both_B, z["in/z"]) + regular

    layout, _ = inputs(config, fields, vectors={"all": p["embeddings"]}, weights={}, dense=none, tasks=3)
    head = config.build(layout.sizes).double()
    assert isinstance(head, ESMM)
    for tower, name in ((head.click, "ctr"), (head.conversion, "cvr")):
        linears = [module for module in tower.modules() if isinstance(module, nn.Linear)]
        for linear, layer in zip(linears, (f"{name}_mlp0", f"{name}_mlp1", f"{name}_out"), strict=True):
            fill_linear(linear, weight=p[f"{layer}/weights"], bias=p[f"{layer}/biases"])
    return Case(head, p, logits, loss)


def close(got: Tensor, wanted: Any, *, tol: float = 1e-6) -> None:
    torch.testing.assert_close(got, torch.as_tensor(wanted), rtol=tol, atol=tol)


def test_din() -> None:
    z = load("din")
    case = build_din(z, normalise="none")
    check(case, z)
    close(torch.sigmoid(case.logits()), z["out/prob"])


def test_din_with_softmax_where_an_empty_history_reads_row_0() -> None:
    z = load("din_softmax")
    check(build_din(z, normalise="softmax", padding_counts=True), z)


def test_din_with_softmax_gives_zeros_for_an_empty_history() -> None:
    z, unnormalised = load("din_softmax"), load("din")
    case, empty_B = build_din(z, normalise="softmax"), z["in/seq_length"] == 0
    case.head.eval()
    logits_B = case.logits()
    close(logits_B[~empty_B], z["out/logit"][~empty_B])
    assert all((z[key] == unnormalised[key]).all() for key in z if key.startswith(("w/", "in/")))
    close(logits_B[empty_B], unnormalised["out/logit"][empty_B])  # sums of nothing in both
    assert abs(logits_B[1].item() - z["out/logit"][1]) > 0.01


def test_dice_is_the_affine_one_without_scale_and_shift() -> None:
    dice = Dice(3).double().eval()
    mean, var = np.array([0.1, -0.2, 0.3]), np.array([0.5, 1.0, 2.0])
    dice.norm.running_mean, dice.norm.running_var = torch.tensor(mean), torch.tensor(var)
    alpha_D = leaf(np.array([0.3, -0.1, 0.2]))
    dice.alpha_D = nn.Parameter(alpha_D.detach())
    one_D, zero_D = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    affine = AffineDice(alpha_D, weight_D=one_D, bias_D=zero_D, mean=mean, var=var)
    x = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    close(dice(x), affine(x), tol=1e-12)


def test_esmm() -> None:
    z = load("esmm")
    case = build_esmm(z)
    click_B, both_B, after_B = case.logits().unbind(dim=1)
    close(click_B, z["out/logit_pctr"])
    close(after_B, z["out/logit_pcvr"])
    for logits_B, name in ((click_B, "pctr"), (both_B, "pctcvr"), (after_B, "pcvr")):
        close(torch.sigmoid(logits_B), z[f"out/{name}"])
    check(Case(case.head, case.parameters, lambda: case.logits()[:, 0], case.loss), z, logit="out/logit_pctr")


def test_esmm_five_steps_of_adam() -> None:
    z = load("esmm")
    case = build_esmm(z)
    settings = OptimizerSettings(optimizer="adam", learning_rate=float(z["traj/Adam/lr"]), eps_hat=True)
    states = {name: [torch.zeros_like(p) for _ in range(state_count(settings))] for name, p in case.parameters.items()}
    for name, weights in case.parameters.items():
        start_states(settings, weights.detach(), states=states[name])
    for step in range(1, 6):
        loss = case.loss()
        close(loss, z["traj/Adam/loss"][step - 1], tol=1e-5)
        gradients = torch.autograd.grad(loss, list(case.parameters.values()))
        with torch.no_grad():
            for (name, weights), gradient in zip(case.parameters.items(), gradients, strict=True):
                update(settings, weights, gradients=gradient, states=states[name], step=step)
    for name, weights in case.parameters.items():
        close(weights.detach(), z[f"traj/Adam/w/{name}"], tol=1e-5)


# What every head here has to obey.

SMALL = {"hidden": [8, 4]}
PAIRS = [CANDIDATE, AttentionPair(query=["item"], keys=["pages"])]
TWO = [CANDIDATE, AttentionPair(query=["item", "user"], keys=["hist_item", "hist_cate"])]
EXPERT, TOWER = Tower(hidden=[6, 5]), Tower(hidden=[4])
BST_SMALL = BSTConfig(attention=[CANDIDATE], **SMALL)
HEADS: dict[str, ModelConfig] = {
    "din": DINConfig(attention=PAIRS, **SMALL),
    "din softmax": DINConfig(
        attention=PAIRS, attention_hidden=[6, 3], attention_activation="sigmoid", normalise="softmax", scale=True
    ),
    "din prelu": DINConfig(attention=[CANDIDATE], attention_activation="prelu", activation="dice", hidden=[8]),
    "din shared": DINConfig(attention=TWO, attention_activation="relu", share_attention=True, hidden=[8]),
    "bst": BST_SMALL,
    "bst flat": BSTConfig(attention=PAIRS, blocks=2, heads=4, pooling="flatten", attention_keep=0.9, hidden=[8]),
    "esmm": ESMMConfig(post_click="after", tower=DeepConfig(hidden=[8])),
    "esmm din bst": ESMMConfig(click_tower=DINConfig(attention=PAIRS), conversion_tower=BST_SMALL),
    "esmm wide": ESMMConfig(conversion_tower=WideConfig(), tower=DeepFMConfig(hidden=[8])),
    "mmoe": MMoEConfig(experts=3, expert=EXPERT, tower=TOWER),
    "ple": PLEConfig(levels=3, shared_experts=1, task_experts=2, expert=EXPERT, tower=TOWER),
    "cgc": PLEConfig(levels=1, shared_experts=2, task_experts=1, expert=EXPERT, tower=TOWER),
}
SEQUENCES = (("hist_item", 5), ("hist_cate", 5), ("pages", 3))


def sizes_of(name: str, *, dense: int = 2) -> Sizes:
    tasks = {"esmm": ("conversion", "click", "after")}.get(name, ("conversion", "click"))
    sequences = SEQUENCES if HEADS[name].unpooled else ()
    return Sizes(("user", "item", "cate"), 4, dense, tasks, sequences)


def made(name: str, *, dense: int = 2) -> Head:
    head = HEADS[name].build(sizes_of(name, dense=dense))
    init_head(head, torch.Generator().manual_seed(5))
    return head


def drawn(name: str, rows: int, *, dense: int = 2) -> Inputs:
    """Row 0 has full histories, row 1 empty ones."""
    sizes, draw = sizes_of(name, dense=dense), torch.Generator().manual_seed(rows)
    emb_BFK = torch.randn(rows, 3, 4, generator=draw)
    sequences, masks, lengths_B = [], [], torch.randint(0, 6, (rows,), generator=draw)
    lengths_B[:2] = torch.tensor([5, 0])[:rows]
    for _, length in sizes.sequences:
        masks.append((torch.arange(length) < lengths_B[:, None]).float())
        sequences.append(torch.randn(rows, length, 4, generator=draw) * masks[-1][:, :, None])
    linear_BL, dense_BN = torch.randn(rows, 3, generator=draw), torch.randn(rows, dense, generator=draw)
    return Inputs(emb_BFK, linear_BL, dense_BN, emb_BFK, tuple(sequences), tuple(masks))


def tensors(given: Inputs) -> Iterator[Tensor]:
    yield from (given.emb_BFK, given.linear_BL, given.dense_BN, given.entries_BEK, *given.sequences, *given.masks)


def mapped(given: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    emb, linear, dense, entries, *rest = [change(tensor) for tensor in tensors(given)]
    count = len(given.sequences)
    return Inputs(emb, linear, dense, entries, tuple(rest[:count]), tuple(rest[count:]))


every_head = pytest.mark.parametrize("name", HEADS)
with_histories = pytest.mark.parametrize("name", [name for name, config in HEADS.items() if config.unpooled])


@every_head
def test_a_gradient_reaches_every_parameter(name: str) -> None:
    head = made(name)
    logits_BT = head(drawn(name, 64))
    assert logits_BT.shape == (64, len(sizes_of(name).tasks))
    binary_cross_entropy_with_logits(logits_BT, (torch.rand_like(logits_BT) > 0.5).float()).backward()
    for parameter, weights in head.named_parameters():
        assert weights.grad is not None and weights.grad.isfinite().all() and weights.grad.any(), parameter


@every_head
def test_rows_do_not_see_each_other(name: str) -> None:
    head, given = made(name).eval(), drawn(name, 9)
    whole_BT = head(given)
    for at in range(9):
        close(head(mapped(given, lambda tensor, at=at: tensor[at : at + 1])), whole_BT[at : at + 1])


@every_head
def test_float32_says_what_float64_does(name: str) -> None:
    head, given = made(name).eval(), drawn(name, 33)
    single_BT = head(given)
    close(single_BT.double(), head.double()(mapped(given, Tensor.double)), tol=1e-5)


@every_head
def test_dense_inputs_may_lack(name: str) -> None:
    assert made(name, dense=0)(drawn(name, 4, dense=0)).isfinite().all()


class Flat(nn.Module):
    """A head whose inputs are not a record."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, *given: Tensor) -> Tensor:
        count = (len(given) - 4) // 2
        emb, linear, dense, entries = given[:4]
        logits_BT: Tensor = self.head(Inputs(emb, linear, dense, entries, given[4 : 4 + count], given[4 + count :]))
        return logits_BT


@every_head
def test_export_for_any_number_of_rows(name: str) -> None:
    head = made(name).eval()
    example = tuple(tensors(drawn(name, 4)))
    rows = torch.export.Dim("rows", min=1, max=4096)
    shapes = (tuple({0: rows} for _ in example),)
    exported = torch.export.export(Flat(head), example, dynamic_shapes=shapes).module()
    for count in (1, 2, 7, 100):
        given = drawn(name, count)
        close(exported(*tensors(given)), head(given))


@with_histories
@pytest.mark.parametrize("training", [True, False])
def test_empty_histories_are_finite(name: str, training: bool) -> None:
    head = made(name).train(training)
    given = mapped(drawn(name, 6), lambda tensor: tensor.clone().requires_grad_())
    given = given._replace(masks=tuple(torch.zeros_like(mask) for mask in given.masks))
    logits_BT = head(given)
    assert logits_BT.isfinite().all()
    logits_BT.sum().backward()
    leaves = [*head.parameters(), given.emb_BFK, *given.sequences]
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves)
    assert given.emb_BFK.grad is not None and given.emb_BFK.grad.any()


@with_histories
@pytest.mark.parametrize("training", [True, False])
def test_what_stands_in_a_padded_position_changes_nothing(name: str, training: bool) -> None:
    given = drawn(name, 12)
    full = zip(given.sequences, given.masks, strict=True)
    spoilt = [torch.where(mask[:, :, None] > 0, rows, torch.nan) for rows, mask in full]
    results = []
    for sequences in (given.sequences, tuple(spoilt)):
        head = made(name).train(training)
        torch.manual_seed(1)
        logits_BT = head(given._replace(sequences=sequences))
        logits_BT.square().sum().backward()
        results.append(
            [logits_BT.detach(), *head.buffers(), *(p.grad for p in head.parameters() if p.grad is not None)]
        )
    for clean, other in zip(*results, strict=True):
        torch.testing.assert_close(clean, other, rtol=0, atol=0)


def test_an_empty_history_is_read_as_zeros() -> None:
    for normalise in ("none", "softmax"):
        config = DINConfig(attention=[CANDIDATE], normalise=normalise, **SMALL)
        head, given = config.build(sizes_of("din")), drawn("din", 8)
        assert isinstance(head, DIN)
        empty = torch.zeros(8, 5, dtype=torch.bool)
        attended_BD = head.units["pair0"](given.emb_BFK[:, 1:].flatten(1), torch.randn(8, 5, 8), empty)
        assert not attended_BD.any()


def test_dice_takes_statistics_over_valid_positions_alone() -> None:
    head, given = made("din").train(), drawn("din", 16)
    assert isinstance(head, DIN)
    seen: list[Tensor] = []
    unit = head.units["pair0"]
    unit.linears[0].register_forward_hook(lambda _, __, out: seen.append(out.detach()))
    head(given)
    valid_RD = seen[0]
    assert len(valid_RD) == given.masks[0].sum()
    norm = unit.activations[0].norm
    close(norm.running_mean, 0.1 * valid_RD.mean(dim=0))
    close(norm.running_var, 0.9 + 0.1 * valid_RD.var(dim=0))


def test_attention_weighs_each_position_by_its_own_score() -> None:
    """A row's result is the sum, or the softmax's average, over single-position histories."""
    given = drawn("din", 8)
    query_BD, keys_BLD = given.emb_BFK[:, 1:].flatten(1), torch.cat(given.sequences[:2], dim=2)
    valid_BL = given.masks[0] > 0
    unit = made("din").eval().units["pair0"]
    parts = [unit(query_BD, keys_BLD[:, at : at + 1], valid_BL[:, at : at + 1]) for at in range(5)]
    close(unit(query_BD, keys_BLD, valid_BL), torch.stack(parts).sum(dim=0))
    config = DINConfig(attention=[CANDIDATE], normalise="softmax", scale=True)
    unit = config.build(sizes_of("din")).eval().units["pair0"]
    one_D = torch.ones(8, 5, 8)
    close(unit(query_BD, one_D, valid_BL), valid_BL.any(dim=1, keepdim=True).float().expand(8, 8))


def test_pairs_of_one_width_share_their_network_when_told() -> None:
    head = made("din shared")
    assert isinstance(head, DIN) and list(head.units) == ["width8"]
    assert list(made("din").units) == ["pair0", "pair1"]
    shared = DINConfig(attention=PAIRS, share_attention=True).build(sizes_of("din"))
    assert list(shared.units) == ["width8", "width4"]


@pytest.mark.parametrize("name", ["din softmax", "bst"])
def test_what_the_tower_reads(name: str) -> None:
    """Fields, what was read of histories, the average of a sequence that no pair names, dense inputs."""
    given, pair = drawn(name, 6), AttentionPair(query=["item"], keys=["hist_item"])
    head = HEADS[name].model_copy(update={"attention": [pair]}).build(sizes_of(name)).eval()
    seen: list[Tensor] = []
    head.deep.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    head(given)
    assert torch.equal(seen[0][:, :12], given.emb_BFK.flatten(1)) and torch.equal(seen[0][:, -2:], given.dense_BN)
    for at, column in ((1, 16), (2, 20)):
        lengths_B1 = given.masks[at].sum(dim=1, keepdim=True)
        close(seen[0][:, column : column + 4] * lengths_B1, given.sequences[at].sum(dim=1))
        assert not seen[0][1, column : column + 4].any()  # an empty one


def test_scale_divides_scores_by_the_root_of_the_width() -> None:
    given = drawn("din", 8)
    scaled = made("din softmax").eval()
    plain = HEADS["din softmax"].model_copy(update={"scale": False}).build(sizes_of("din")).eval()
    plain.load_state_dict(scaled.state_dict())
    assert (plain(given) - scaled(given)).abs().max() > 1e-4
    with torch.no_grad():
        for name, width in (("pair0", 8), ("pair1", 4)):
            plain.units[name].score.weight.div_(width**0.5)
    close(plain(given), scaled(given))


def test_bst_knows_the_order_and_not_the_side_of_the_padding() -> None:
    head, given = made("bst").eval(), drawn("bst", 8)
    assert isinstance(head, BST)
    (encoder,) = head.encoders
    with torch.no_grad():
        encoder.positions_LD.mul_(50)
    ((query_BD, keys_BLD, valid_BL),) = head.histories.read(given)
    wanted_BD = encoder(query_BD, keys_BLD, valid_BL)
    lengths = valid_BL.sum(dim=1).tolist()
    moved = torch.stack([keys.roll(-n, 0) for keys, n in zip(keys_BLD, lengths, strict=True)])
    close(encoder(query_BD, moved, valid_BL.flip(1)), wanted_BD)
    turned = torch.stack([torch.cat([k[:n].flip(0), k[n:]]) for k, n in zip(keys_BLD, lengths, strict=True)])
    changed_B = (encoder(query_BD, turned, valid_BL) - wanted_BD).abs().amax(dim=1) > 1e-3
    assert changed_B.tolist() == [n > 1 for n in lengths]


def test_faults_of_pairs_name_them_all() -> None:
    sizes = sizes_of("din")
    wrong = [
        AttentionPair(query=["shop"], keys=["hist_item", "pages"]),
        AttentionPair(query=["user"], keys=["visits"]),
    ]
    for config in (DINConfig(attention=wrong), BSTConfig(attention=wrong)):
        text = "; ".join(config.faults(sizes))
        for part in ("'shop'", "'visits'", "1 fields ['shop'] for 2 sequences", "unequal lengths"):
            assert part in text
        with pytest.raises(ValueError, match=r"'shop'.*'visits'"):
            config.build(sizes)
    assert BSTConfig(attention=[CANDIDATE], heads=3).faults(sizes) == ["attention: 3 heads for a width of 8"]
    assert not DINConfig(attention=PAIRS).faults(sizes)


def test_conversions_are_clicks_times_conversions_after_them() -> None:
    head = made("esmm").eval()
    both_B, click_B, after_B = torch.sigmoid(head(drawn("esmm", 200))).unbind(dim=1)  # as the tasks are named
    close(both_B, click_B * after_B, tol=1e-7)


class Given(Head):
    """Logits that are inputs."""

    def __init__(self, column: int) -> None:
        super().__init__()
        self.column = column

    def forward(self, inputs: Inputs) -> Tensor:
        return inputs.dense_BN[:, self.column : self.column + 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conversion_logits_are_stable(dtype: torch.dtype) -> None:
    head = made("esmm")
    assert isinstance(head, ESMM)
    head.click, head.conversion = Given(0), Given(1)
    cases = [(800, 800), (800, -800), (-800, 800), (-800, -800), (0, 0), (800, 0), (-800, 3), (30, 2)]
    a_BT = torch.tensor(cases, dtype=dtype, requires_grad=True)
    none = torch.zeros(len(cases), 0, dtype=dtype)
    both_B = head(Inputs(none[:, :, None], none, a_BT, none[:, :, None]))[:, 0]
    wanted = [800 - np.log(2), -800, -800, -1600, -np.log(3), 0, -800 - np.log1p(np.exp(-3)), 2]
    close(both_B, torch.tensor(wanted, dtype=dtype))
    for label in (0.0, 1.0):
        loss = binary_cross_entropy_with_logits(both_B, torch.full_like(both_B, label))
        (grad,) = torch.autograd.grad(loss, a_BT, retain_graph=True)
        assert loss.isfinite() and grad.isfinite().all() and grad.any()


@every_head
def test_settings_survive_json(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = HEADS[name]
    for kind in (DINConfig, BSTConfig):
        monkeypatch.setitem(MODELS, kind.model_fields["kind"].default, kind)
    assert type(config).model_validate(config.model_dump(mode="json")) == config


def test_towers_are_sections_with_a_kind() -> None:
    raw = {"kind": "esmm", "tower": {"kind": "deepfm", "hidden": [5]}, "conversion_tower": {"kind": "wide"}}
    config = ESMMConfig.model_validate(raw)
    assert config.towers == (DeepFMConfig(hidden=[5]), WideConfig())
    assert (config.linear, config.vectors, config.unpooled) == (True, True, False)
    assert (ESMMConfig().linear, ESMMConfig(tower=WideConfig()).vectors) == (False, False)
    assert HEADS["esmm din bst"].unpooled
    with pytest.raises(ValidationError, match="'kind' is 'dep', wanted one of "):
        ESMMConfig.model_validate({"tower": {"kind": "dep"}})
    with pytest.raises(ValidationError) as caught:
        ESMMConfig.model_validate({"tower": {"kind": "deep", "hiden": [5]}})
    assert [detail["loc"] for detail in caught.value.errors()] == [("tower", "hiden")]


def test_faults_of_esmm_name_tasks_and_towers() -> None:
    sizes = sizes_of("mmoe")._replace(tasks=("click", "like"))
    text = "; ".join(ESMMConfig(tower=DINConfig(attention=PAIRS)).faults(sizes))
    assert "task 'conversion' is not among the tasks ['click', 'like']" in text
    assert "task 'like' is none of this model's" in text
    assert "click tower: attention: 'hist_item'" in text and "conversion tower: attention: 'hist_item'" in text
    assert "tasks of one name" in ESMMConfig(conversion="click").faults(sizes)[-1]
    mixed = ESMMConfig(click_tower=DINConfig(attention=PAIRS))
    assert ["would not see them" in fault for fault in mixed.faults(sizes_of("din"))] == [True]
    with pytest.raises(ValueError, match="'like'"):
        ESMMConfig().build(sizes)


def test_penalties_of_both_towers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    head = made("esmm")
    assert isinstance(head, ESMM) and head.penalty() is None
    monkeypatch.setattr(head.click, "penalty", lambda: torch.tensor(2.0))
    assert head.penalty() == 2
    monkeypatch.setattr(head.conversion, "penalty", lambda: torch.tensor(3.0))
    assert head.penalty() == 5


def test_equal_experts_make_gates_idle() -> None:
    """Gates sum to 1: with one expert's weights in all, mmoe and cgc are that expert and the towers."""
    for name in ("mmoe", "cgc"):
        head, given = made(name), drawn(name, 20)
        if isinstance(head, MMoE):
            mlps = list(head.experts.mlps)
        else:
            assert isinstance(head, PLE)
            mlps = [mlp for experts in head.levels[0].experts for mlp in experts.mlps]
        assert len(mlps) == (3 if name == "mmoe" else 4)
        assert not torch.equal(mlps[0](given.deep_BD()), mlps[1](given.deep_BD()))
        for mlp in mlps[1:]:
            mlp.load_state_dict(mlps[0].state_dict())
        expert_BH = mlps[0](given.deep_BD())
        close(head(given), torch.cat([tower(expert_BH) for tower in head.towers], dim=1))


@pytest.mark.parametrize("levels", [1, 2])
def test_a_task_reads_other_tasks_experts_from_the_second_level_on(levels: int) -> None:
    config = PLEConfig(levels=levels, shared_experts=1, task_experts=1, expert=EXPERT, tower=TOWER)
    head, given = config.build(sizes_of("ple")), drawn("ple", 20)
    init_head(head, torch.Generator().manual_seed(5))
    assert isinstance(head, PLE)
    before_BT = head(given)
    with torch.no_grad():
        for weights in head.levels[0].experts[1].parameters():
            weights.add_(0.5)
    changed_T = (head(given) - before_BT).abs().amax(dim=0) > 1e-6
    assert changed_T.tolist() == [levels == 2, True]


@pytest.mark.parametrize("kind", [MMoEConfig, PLEConfig])
def test_one_task_or_three(kind: type[ModelConfig]) -> None:
    for tasks in (("click",), ("click", "like", "share")):
        head = kind().build(sizes_of("mmoe")._replace(tasks=tasks))
        assert head(drawn("mmoe", 3)).shape == (3, len(tasks))
