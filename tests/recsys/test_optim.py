"""The optimizers against TensorFlow's own runs (tests/golden/optimizers.json), torch's optimizers, and their laws."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torchrec.optim import RowWiseAdagrad

from recsys.experiment import Train
from recsys.learner import dense_optimizer
from recsys.models.head import Sizes
from recsys.models.wide_deep import WideDeepConfig
from recsys.optim import DenseOptimizer, OptimizerSettings, start_states, state_count, update
from tests.golden.case import load

FTRL = {"optimizer": "ftrl", "learning_rate": 0.1, "accumulator_start": 0.1}
ADAM = {"optimizer": "adam", "learning_rate": 0.01, "eps_hat": True}
RUNS: dict[str, dict[str, Any]] = {
    "gd": {"optimizer": "sgd", "learning_rate": 0.1},
    "momentum95": {"optimizer": "momentum", "learning_rate": 0.05, "momentum": 0.95},
    "nesterov9": {"optimizer": "momentum", "learning_rate": 0.05, "momentum": 0.9, "nesterov": True},
    "adagrad_1e-8": {"optimizer": "adagrad", "learning_rate": 0.05, "accumulator_start": 1e-8, "eps": 0.0},
    "adagrad_0.1": {"optimizer": "adagrad", "learning_rate": 0.05, "accumulator_start": 0.1, "eps": 0.0},
    "adam": ADAM | {"eps": 1e-8},
    "adam_eps1e-2": ADAM | {"eps": 1e-2},
    "ftrl": FTRL,
    "ftrl_l1l2": FTRL | {"l1": 0.3, "ftrl_l2": 0.2},
    "ftrl_shrink": FTRL | {"l1": 0.01, "l2_shrinkage": 0.1},
    "ftrl_beta": FTRL | {"accumulator_start": 0.0, "l1": 0.1, "ftrl_l2": 0.1, "ftrl_beta": 1.0},
    "ftrl_pow": FTRL | {"ftrl_power": -0.7, "accumulator_start": 0.2},
}
SLOTS = {"momentum": ["momentum"], "adagrad": ["accumulator"], "adam": ["m", "v"], "ftrl": ["accum", "linear"]}
MOST_STEPS = 6


def settings_of(run: str, *, step: int) -> OptimizerSettings:
    """The run's constants as TensorFlow held them: in float32, although the variables were float64.

    What it derives from them is float32 too: Adam's powers of the betas, multiplied step by step, and the sum of FTRL's
    l2 and beta / (2 lr). `learning_rate` and `ftrl_beta` take up these two differences, which are below 1e-7.
    """
    raw = {"beta1": 0.9, "beta2": 0.999} | RUNS[run]
    held = {
        key: float(np.float32(value)) if isinstance(value, float) and key != "accumulator_start" else value
        for key, value in raw.items()
    }
    if held["optimizer"] == "adam":
        powers = [np.float32(1), np.float32(1)]
        for _ in range(step):
            powers = [powers[0] * np.float32(0.9), powers[1] * np.float32(0.999)]
        theirs = np.sqrt(1 - float(powers[1])) / (1 - float(powers[0]))
        held["learning_rate"] *= theirs / (np.sqrt(1 - held["beta2"] ** step) / (1 - held["beta1"] ** step))
    if "ftrl_beta" in held:
        total = float(np.float32(raw["ftrl_l2"] + raw["ftrl_beta"] / (2 * raw["learning_rate"])))
        held["ftrl_beta"] = (total - held["ftrl_l2"]) * 2 * held["learning_rate"]
    return OptimizerSettings(**held)


def near(found: Tensor, wanted: Any) -> None:
    torch.testing.assert_close(found, torch.as_tensor(wanted), rtol=1e-12, atol=1e-12)


def start(run: str) -> tuple[Tensor, list[Tensor]]:
    settings = settings_of(run, step=1)
    weights = torch.tensor(load("optimizers")["in/var0"])
    states = [torch.full_like(weights, torch.nan) for _ in range(state_count(settings))]
    start_states(settings, weights, states=states)
    return weights, states


def check_slots(run: str, mode: str, *, states: list[Tensor]) -> None:
    names = SLOTS.get(RUNS[run]["optimizer"], [])
    for state, slot in zip(states, names, strict=True):
        near(state, load("optimizers")[f"{run}/{mode}/slot_{slot}"])


@pytest.mark.parametrize("run", RUNS)
def test_dense_steps_are_tensorflows(run: str) -> None:
    z = load("optimizers")
    weights, states = start(run)
    for at, gradients in enumerate(z["in/dense_grads"]):
        settings = settings_of(run, step=at + 1)
        update(settings, weights, gradients=torch.tensor(gradients), states=states, step=at + 1)
        near(weights, z[f"{run}/dense"][at])
    check_slots(run, "dense", states=states)


def sparse_run(run: str, *, lazy: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Weights after each step, and the states at the end. Gradients of one row are summed before the step."""
    z = load("optimizers")
    weights, states = start(run)
    found = []
    for at in range(MOST_STEPS):
        touched, gradients = torch.tensor(z["in/sparse_rows"][at]), torch.tensor(z["in/sparse_grads"][at])
        summed = torch.zeros_like(weights).index_add_(0, touched, gradients)
        rows = touched.unique() if lazy else torch.arange(len(weights))
        own, kept = weights[rows], [state[rows] for state in states]
        update(settings_of(run, step=at + 1), own, gradients=summed[rows], states=kept, step=at + 1)
        weights[rows] = own
        for state, new in zip(states, kept, strict=True):
            state[rows] = new
        found.append(weights.clone())
    return found, states


@pytest.mark.parametrize("run", RUNS)
def test_sparse_steps_are_tensorflows(run: str) -> None:
    """Adam moves every row at each step, as for a dense gradient with zeros; the others the touched rows alone."""
    found, states = sparse_run(run, lazy="adam" not in run)
    near(torch.stack(found), load("optimizers")[f"{run}/sparse"])
    check_slots(run, "sparse", states=states)


@pytest.mark.parametrize("run", RUNS)
def test_which_rows_move_matters_but_for_sgd_and_adagrad(run: str) -> None:
    lazy, eager = (torch.stack(sparse_run(run, lazy=lazy)[0]) for lazy in (True, False))
    same = RUNS[run]["optimizer"] in ("sgd", "adagrad")
    assert float((lazy - eager).abs().max()) < 1e-15 if same else float((lazy - eager).abs().max()) > 1e-3


def test_every_run_of_the_file_is_compared() -> None:
    assert {key.split("/")[0] for key in load("optimizers")} == {"in", *RUNS}
    assert len(load("optimizers")["in/sparse_rows"]) == MOST_STEPS


NUMBERS = st.floats(-3, 3, width=16)
STEPS = st.lists(st.lists(NUMBERS, min_size=6, max_size=6), min_size=1, max_size=5)
POSITIVE = st.floats(0.01, 1)
TORCH = {
    "sgd": lambda s: (torch.optim.SGD, {}),
    "momentum": lambda s: (torch.optim.SGD, {"momentum": s.momentum, "nesterov": s.nesterov}),
    "adagrad": lambda s: (
        torch.optim.Adagrad,
        {"initial_accumulator_value": s.accumulator_start, "eps": s.eps},
    ),
    "rowwise_adagrad": lambda s: (
        RowWiseAdagrad,
        {"initial_accumulator_value": s.accumulator_start, "eps": s.eps},
    ),
    "adam": lambda s: (torch.optim.Adam, {"betas": (s.beta1, s.beta2), "eps": s.eps}),
}
SETTINGS = st.builds(
    OptimizerSettings,
    optimizer=st.sampled_from(sorted(TORCH)),
    learning_rate=POSITIVE,
    momentum=st.floats(0.01, 0.99),
    nesterov=st.booleans(),
    accumulator_start=st.floats(0, 1),
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0, 0.9999),
    eps=st.floats(1e-8, 0.1),
)


def run_with(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, gradients: list[list[float]]) -> None:
    for values in gradients:
        parameter.grad = torch.tensor(values, dtype=parameter.dtype).reshape(parameter.shape)
        optimizer.step()


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3))


@given(settings=SETTINGS, gradients=STEPS)
def test_torchs_optimizers_take_the_same_steps(settings: OptimizerSettings, gradients: list[list[float]]) -> None:
    ours, theirs = parameter(), parameter()
    build, constants = TORCH[settings.optimizer](settings)
    run_with(DenseOptimizer([([ours], settings)]), ours, gradients)
    run_with(build([theirs], lr=settings.learning_rate, **constants), theirs, gradients)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_where_adams_eps_stands() -> None:
    """The first step of a gradient as small as eps, lr 0.01: the paper's form moves by half the rate."""
    moved = {}
    for eps_hat in (False, True):
        weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        settings = OptimizerSettings(optimizer="adam", learning_rate=0.01, eps_hat=eps_hat)
        run_with(DenseOptimizer([([weight], settings)]), weight, [[1e-8]])
        moved[eps_hat] = -weight.item()
    assert moved[False] == pytest.approx(5.0e-3, rel=0.01) and moved[True] == pytest.approx(3.1e-4, rel=0.02)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adagrad", "rowwise_adagrad", "adam", "ftrl"])
def test_training_goes_on_from_a_saved_state(name: str) -> None:
    settings = OptimizerSettings(optimizer=name, learning_rate=0.1)
    gradients = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).tolist()
    through = parameter()
    run_with(DenseOptimizer([([through], settings)]), through, gradients)
    first = parameter()
    before = DenseOptimizer([([first], settings)])
    run_with(before, first, gradients[:2])
    second = torch.nn.Parameter(first.detach().clone())
    after = DenseOptimizer([([second], settings)])
    saved = copy.deepcopy(before.state_dict())
    saved["state"][0] = dict(reversed(saved["state"][0].items()))  # the order of states does not matter
    after.load_state_dict(saved)
    run_with(after, second, gradients[2:])
    assert torch.equal(through, second)
    assert not torch.equal(through, first)


def test_states_can_be_loaded_in_place() -> None:
    """As torch.distributed.checkpoint does, tensor by tensor, in an order of its own."""
    settings = OptimizerSettings(optimizer="adam", learning_rate=0.1)
    one, other = parameter(), parameter()
    source, target = DenseOptimizer([([one], settings)]), DenseOptimizer([([other], settings)])
    run_with(source, one, [[1.0, -2.0, 3.0, 0.5, 0.0, 1.0]] * 3)
    for key, value in reversed(source.state_dict()["state"][0].items()):
        target.state_dict()["state"][0][key].copy_(value)
    with torch.no_grad():
        other.copy_(one)
    for optimizer, weights in ((source, one), (target, other)):
        run_with(optimizer, weights, [[0.1] * 6])
    assert torch.equal(one, other)


def test_a_parameter_without_gradient_keeps_weights_states_and_step() -> None:
    settings = OptimizerSettings(optimizer="adam", learning_rate=0.1)
    used, idle = parameter(), parameter()
    optimizer = DenseOptimizer([([used, idle], settings)])
    run_with(optimizer, used, [[1.0] * 6] * 2)
    assert torch.equal(idle, parameter())
    run_with(optimizer, idle, [[1.0] * 6])
    assert [int(optimizer.state[p]["step"]) for p in (used, idle)] == [3, 1]
    alone = parameter()
    run_with(DenseOptimizer([([alone], settings)]), alone, [[1.0] * 6])
    assert torch.equal(idle, alone)


def ftrl_step(gradient: float, dtype: torch.dtype = torch.float64, **constants: Any) -> tuple[Tensor, Tensor]:
    weights = torch.tensor([0.05, -0.03, 0.02, 0.04, 0.0], dtype=dtype)
    before = weights.clone()
    settings = OptimizerSettings(**FTRL | constants)
    states = [torch.empty_like(weights) for _ in range(2)]
    start_states(settings, weights, states=states)
    update(settings, weights, gradients=torch.full_like(weights, gradient), states=states, step=1)
    return before, weights


@given(
    start=st.floats(0.001, 1),
    l1=st.floats(0, 1),
    l2=st.floats(0, 1),
    beta=st.floats(0, 1),
    power=st.floats(-1, 0),
)
def test_ftrl_keeps_initial_weights_where_asked(start: float, l1: float, l2: float, beta: float, power: float) -> None:
    constants = {"l1": l1, "ftrl_l2": l2, "ftrl_beta": beta, "ftrl_power": power, "accumulator_start": start}
    before, after = ftrl_step(0.0, preserve_init=True, **constants)
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-12)
    assert torch.equal(ftrl_step(0.0, preserve_init=False, **constants)[1], torch.zeros_like(after))


def test_ftrl_forgets_initial_weights_otherwise() -> None:
    """One gradient of 1e-3 makes all of them -1.6e-4; those that it keeps move by as much."""
    before, after = ftrl_step(1e-3, learning_rate=0.05)
    torch.testing.assert_close(after, torch.full_like(after, -1.58e-4), rtol=0.01, atol=0)
    _, kept = ftrl_step(1e-3, learning_rate=0.05, preserve_init=True)
    torch.testing.assert_close(kept - before, torch.full_like(after, -1.58e-4), rtol=0.01, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gradient", [0.0, 1e-30])
def test_ftrl_without_a_start_stays_finite(dtype: torch.dtype, gradient: float) -> None:
    before, after = ftrl_step(gradient, dtype, accumulator_start=0.0)
    moved = gradient**2 > torch.finfo(dtype).tiny
    torch.testing.assert_close(after, before - 0.1 if moved else torch.zeros_like(after))


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"optimizer": "adagrad", "eps": 0.0}, "'eps' or 'accumulator_start'"),
        ({"optimizer": "rowwise_adagrad", "eps": 0.0}, "'eps' or 'accumulator_start'"),
        ({"optimizer": "adam", "eps": 0.0, "accumulator_start": 0.1}, "'eps'"),
        ({"optimizer": "ftrl", "preserve_init": True}, "'preserve_init' needs"),
        ({"optimizer": "ftrl", "l2_shrinkage": 0.1}, "'l2_shrinkage' needs"),
    ],
)
def test_settings_that_divide_by_zero_are_refused(raw: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        OptimizerSettings(**raw)


def test_first_order_weights_may_have_an_optimizer_of_their_own() -> None:
    """Wide & Deep: FTRL moves the wide part of the head, Adagrad the deep part."""
    head = WideDeepConfig(hidden=[4]).build(Sizes(("f",), 4, 2, ("y",)))
    ftrl = OptimizerSettings(optimizer="ftrl", learning_rate=0.2, accumulator_start=0.1)
    train = Train(optimizer="adagrad", learning_rate=0.05, accumulator_start=0.1)
    by_settings = {
        group["settings"].optimizer: {id(p) for p in group["params"]}
        for group in dense_optimizer(head, train, linear=ftrl).param_groups
    }
    wide = {id(p) for name, p in head.named_parameters() if name.startswith("wide.")}
    assert by_settings == {"ftrl": wide, "adagrad": {id(p) for p in head.parameters()} - wide}
    assert len(dense_optimizer(head, train, linear=None).param_groups) == 1
