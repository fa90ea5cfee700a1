"""Optimizers as pure updates of weights, gradients and states: one code for dense layers and for rows of tables."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from etl.spec import Section

Name = Literal["sgd", "momentum", "adagrad", "rowwise_adagrad", "adam", "ftrl"]


class OptimizerSettings(Section):
    """An optimizer and its constants; each names the optimizers that read it."""

    optimizer: Name = "adam"
    learning_rate: float = Field(1e-3, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum: share of the last step kept")
    nesterov: bool = Field(False, description="momentum: look ahead (Sutskever et al. 2013)")
    accumulator_start: float = Field(0.0, ge=0, description="adagrad, ftrl: where the sums of squares start")
    beta1: float = Field(0.9, ge=0, lt=1, description="adam: decay of the mean gradient")
    beta2: float = Field(0.999, ge=0, lt=1, description="adam: decay of the mean square")
    eps: float = Field(1e-8, ge=0, description="adagrad, adam: added to the root of squares")
    eps_hat: bool = Field(False, description="adam: add eps before the bias correction, as TensorFlow does")
    l1: float = Field(0.0, ge=0, description="ftrl: makes weights exactly 0")
    ftrl_l2: float = Field(0.0, ge=0, description="ftrl: pulls weights to 0")
    l2_shrinkage: float = Field(0.0, ge=0, description="ftrl: L2 of the gradient's side alone")
    ftrl_beta: float = Field(0.0, ge=0, description="ftrl: added to the root of sums of squares")
    ftrl_power: float = Field(-0.5, le=0, description="ftrl: power of the sums of squares in the step")
    preserve_init: bool = Field(False, description="ftrl: start so that the initial weights stay until learnt over")

    @model_validator(mode="after")
    def _no_division_by_zero(self) -> "OptimizerSettings":
        squares = self.accumulator_start if "adagrad" in self.optimizer else 0.0
        if self.optimizer in ("adagrad", "rowwise_adagrad", "adam") and self.eps + squares == 0:
            remedy = "'eps'" if self.optimizer == "adam" else "'eps' or 'accumulator_start'"
            raise ValueError(f"{self.optimizer} needs {remedy} above 0: a gradient of 0 would be divided by 0")
        slope = self.accumulator_start**-self.ftrl_power + self.ftrl_beta + self.ftrl_l2
        if self.optimizer == "ftrl" and (self.preserve_init or self.l2_shrinkage) and slope == 0:
            name = "preserve_init" if self.preserve_init else "l2_shrinkage"
            raise ValueError(f"'{name}' needs 'accumulator_start', 'ftrl_beta' or 'ftrl_l2' above 0")
        return self


def scaled(settings: OptimizerSettings, rate: float) -> OptimizerSettings:
    """The settings with `rate` times their learning rate."""
    return settings if rate == 1.0 else settings.model_copy(update={"learning_rate": settings.learning_rate * rate})


def state_count(settings: OptimizerSettings) -> int:
    """Numbers kept for each weight."""
    return {"sgd": 0, "momentum": 1, "adagrad": 1, "rowwise_adagrad": 1, "adam": 2, "ftrl": 2}[settings.optimizer]


def start_states(settings: OptimizerSettings, weights: Tensor, *, states: Sequence[Tensor]) -> None:
    """Sets the states, of the weights' shape, to where training begins."""
    for state in states:
        state.zero_()
    if settings.optimizer in ("adagrad", "rowwise_adagrad", "ftrl"):
        states[0].fill_(settings.accumulator_start)
    if settings.optimizer == "ftrl" and settings.preserve_init:
        power = settings.accumulator_start**-settings.ftrl_power
        slope = (power + settings.ftrl_beta) / settings.learning_rate + 2 * settings.ftrl_l2
        states[1].copy_(-weights * slope - torch.sign(weights) * settings.l1)


def update(
    settings: OptimizerSettings, weights: Tensor, *, gradients: Tensor, states: Sequence[Tensor], step: int
) -> None:
    """One step, in place, of weights [.., D] by gradients of the same shape; `step` counts from 1.

    Adagrad: Duchi et al. 2011. Adam: Kingma and Ba 2015, algorithm 1, or with `eps_hat` the form before section 2.1.
    FTRL: McMahan et al. 2013, algorithm 1. Row-wise Adagrad keeps the mean square of a row, the same in every column.
    """
    rate, g = settings.learning_rate, gradients
    match settings.optimizer:
        case "sgd":
            weights.sub_(g, alpha=rate)
        case "momentum":
            states[0].mul_(settings.momentum).add_(g)
            weights.sub_(g + settings.momentum * states[0] if settings.nesterov else states[0], alpha=rate)
        case "adagrad" | "rowwise_adagrad":
            square = g.square()
            states[0].add_(square if settings.optimizer == "adagrad" else square.mean(dim=-1, keepdim=True))
            weights.addcdiv_(g, states[0].sqrt().add_(settings.eps), value=-rate)
        case "adam":
            _adam(settings, weights, g=g, mean=states[0], square=states[1], step=step)
        case "ftrl":
            _ftrl(settings, weights, g=g, squares=states[0], linear=states[1])


def adam_step(settings: OptimizerSettings, step: int) -> tuple[float, float]:
    """Adam's learning rate and eps at a step, both with its bias correction: what is left are the running means."""
    correction = math.sqrt(1 - settings.beta2**step)
    eps = settings.eps if settings.eps_hat else settings.eps * correction
    return settings.learning_rate * correction / (1 - settings.beta1**step), eps


def _adam(settings: OptimizerSettings, weights: Tensor, *, g: Tensor, mean: Tensor, square: Tensor, step: int) -> None:
    mean.lerp_(g, 1 - settings.beta1)
    square.mul_(settings.beta2).addcmul_(g, g, value=1 - settings.beta2)
    rate, eps = adam_step(settings, step)
    weights.addcdiv_(mean, square.sqrt().add_(eps), value=-rate)


def _ftrl(settings: OptimizerSettings, weights: Tensor, *, g: Tensor, squares: Tensor, linear: Tensor) -> None:
    power = -settings.ftrl_power
    added = squares + g.square()
    before, after = _power(squares, power), _power(added, power)
    linear.add_(g + 2 * settings.l2_shrinkage * weights - (after - before) / settings.learning_rate * weights)
    slope = (after + settings.ftrl_beta) / settings.learning_rate + 2 * settings.ftrl_l2
    settled = (linear.clamp(-settings.l1, settings.l1) - linear) / slope
    weights.copy_(settled.where(slope > 0, 0.0))  # no slope: no gradient yet, nor anything else that holds a weight
    squares.copy_(added)


def _power(squares: Tensor, power: float) -> Tensor:
    return squares.sqrt() if power == 0.5 else squares.pow(power)  # a general power takes ten times the time


class DenseOptimizer(torch.optim.Optimizer):
    """`update` on whole parameters; its states exist from the start, so that a checkpoint can be loaded into them.

    The step, which counts a parameter's gradients, is one of these states: Adam goes on where it was. `rate` multiplies
    the learning rates.
    """

    def __init__(self, groups: Sequence[tuple[Sequence[torch.nn.Parameter], OptimizerSettings]]) -> None:
        """Each group of parameters has its own settings."""
        super().__init__([{"params": list(parameters), "settings": settings} for parameters, settings in groups], {})
        self.rate = 1.0
        for parameter, settings in self._parameters():
            states = [torch.zeros_like(parameter) for _ in range(state_count(settings))]
            self.state[parameter] = {f"state{at}": state for at, state in enumerate(states)}
            self.state[parameter]["step"] = torch.zeros((), dtype=torch.int64, device="cpu")  # read at each step
        self.start()

    def start(self) -> None:
        """States where training begins, from the weights as they are."""
        for parameter, settings in self._parameters():
            start_states(settings, parameter.detach(), states=self._states(parameter, settings))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # there is no loss to return
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            settings, moving = scaled(group["settings"], self.rate), [p for p in group["params"] if p.grad is not None]
            if moving:
                torch._foreach_add_([self.state[parameter]["step"] for parameter in moving], 1)
            fused = settings.optimizer == "adam" and not settings.eps_hat
            if moving and fused and all(parameter.device.type == "cpu" for parameter in moving):
                self._fused_adam(settings, moving)
                continue
            for parameter in moving:
                states, step = self._states(parameter, settings), int(self.state[parameter]["step"])
                update(settings, parameter, gradients=parameter.grad, states=states, step=step)

    def _fused_adam(self, settings: OptimizerSettings, moving: list[torch.nn.Parameter]) -> None:
        """One pass over all parameters instead of six over each."""
        kept = [self._states(parameter, settings) for parameter in moving]
        torch._fused_adam_(
            list[Tensor](moving),
            [torch.as_tensor(parameter.grad) for parameter in moving],
            [mean for mean, _ in kept],
            [square for _, square in kept],
            [],
            [self.state[parameter]["step"].float() for parameter in moving],
            lr=settings.learning_rate,
            beta1=settings.beta1,
            beta2=settings.beta2,
            weight_decay=0.0,
            eps=settings.eps,
            amsgrad=False,
            maximize=False,
        )

    def _states(self, parameter: torch.nn.Parameter, settings: OptimizerSettings) -> list[Tensor]:
        return [self.state[parameter][f"state{at}"] for at in range(state_count(settings))]

    def _parameters(self) -> Iterator[tuple[torch.nn.Parameter, OptimizerSettings]]:
        return ((parameter, group["settings"]) for group in self.param_groups for parameter in group["params"])
