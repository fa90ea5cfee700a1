"""Five-step runs of the published code: every parameter by the optimizer of its name, from the same start."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from recsys.optim import OptimizerSettings, start_states, state_count, update
from tests.golden.case import Arrays, Case

TRAJECTORIES = {
    "Adam": {"optimizer": "adam", "eps": 1e-8, "eps_hat": True},
    "Adagrad": {"optimizer": "adagrad", "accumulator_start": 1e-8, "eps": 0.0},
    "Momentum": {"optimizer": "momentum", "momentum": 0.95},
    "ftrl": {"optimizer": "ftrl", "accumulator_start": 0.1},
}


def run_steps(
    case: Case, settings: Callable[[str], OptimizerSettings], *, steps: int, touched: Collection[str] = ()
) -> Tensor:
    """Trains the case's parameters in place, each by the optimizer of its name; the losses before each step.

    Rows without a gradient move too, unless the parameter is one of `touched`.
    """
    case.head.eval()
    states: dict[str, list[Tensor]] = {}
    for name, parameter in case.parameters.items():
        states[name] = [torch.zeros_like(parameter) for _ in range(state_count(settings(name)))]
        start_states(settings(name), parameter.detach(), states=states[name])
    losses = []
    for step in range(1, steps + 1):
        loss = case.loss()
        losses.append(loss.detach())
        gradients = torch.autograd.grad(loss, list(case.parameters.values()), materialize_grads=True)
        with torch.no_grad():
            for (name, parameter), gradient in zip(case.parameters.items(), gradients, strict=True):
                changed = (parameter, *states[name])
                before = [tensor.clone() for tensor in changed]
                update(settings(name), parameter, gradients=gradient, states=states[name], step=step)
                for tensor, old in zip(changed, before, strict=True) if name in touched else ():
                    still = ~gradient.flatten(1).any(dim=1)
                    tensor[still] = old[still]
    return torch.stack(losses)


def check_steps(losses: Tensor, case: Case, z: Arrays, prefix: str) -> None:
    torch.testing.assert_close(losses, torch.tensor(z[f"{prefix}/loss"]).double(), rtol=1e-5, atol=1e-5)
    for name, parameter in case.parameters.items():
        wanted = torch.tensor(z[f"{prefix}/w/{name}"]).double().reshape(parameter.shape)
        torch.testing.assert_close(
            parameter.detach(), wanted, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
