"""The network with its optimizers: one update at a time."""

from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from etl.schema import Schema
from recsys.clock import Clock
from recsys.compiled import compile_dense
from recsys.data import Batch
from recsys.experiment import Experiment, Train
from recsys.loss import head_penalty, mean_loss, penalised_layers
from recsys.models.linear import FirstOrder
from recsys.network import Network, Scored, build_network
from recsys.optim import DenseOptimizer, OptimizerSettings
from recsys.parallel.shard import ShardingPlan, shard, training_plan
from recsys.parallel.world import World, average_gradients


class Guard(Protocol):
    """Looks at what came out for a batch, and at this rank's logloss as `mean_loss` has it."""

    def __call__(self, scored: Scored, batch: Batch, *, logloss: Tensor) -> None: ...


class Learner:
    """Tables, head and what moves them. `rate` multiplies all learning rates."""

    def __init__(
        self, experiment: Experiment, schema: Schema, *, world: World, plan: ShardingPlan | None = None
    ) -> None:
        """Without a plan one is made. Raises Fault where nothing fits."""
        self.settings, self.world = experiment.train, world
        self.network = build_network(experiment, schema, table_device="meta")
        plan = plan or training_plan(experiment, schema, world=world)
        self.sharded = shard(self.network, experiment.embedding, world=world, seed=experiment.seed, plan=plan)
        self.model = self.sharded.model
        if self.settings.compile:
            compile_dense(self._network(), device=self.settings.device)
        self.optimizer = dense_optimizer(self.model, self.settings, linear=experiment.embedding.linear)
        self.penalised = penalised_layers(self.network.head, self.settings.layer_l2)
        self.clock = Clock()
        self.clock.watch(tables=self._network().tables, looked_up=self.network.looked_up)
        self.task_weights_T = torch.tensor([task.weight for task in schema.tasks], device=world.device)

    def update(self, batch: Batch, *, step: int, guard: Guard) -> Tensor:
        """Step `step` of the tables, counted from 1: they move inside the backward pass, dense weights after it.

        Returns this rank's logloss. `guard` sees each scored batch before anything moves.
        """
        self.clock.lap("data")
        self.sharded.begin_step(step)
        self.optimizer.zero_grad()
        logloss = self._backward(batch, guard) if self.settings.accumulate == 1 else self._in_parts(batch, guard)
        self.clock.lap("sparse")
        if self.settings.clip_norm:
            clip_grad_norm_(self._dense_parameters(), self.settings.clip_norm)
        self.optimizer.step()
        self.clock.lap("dense")
        return logloss

    def set_rate(self, factor: float) -> None:
        """All learning rates are `factor` times those of the experiment from now on."""
        self.optimizer.rate = factor
        self.sharded.scale_rate(factor)

    def _backward(self, batch: Batch, guard: Guard) -> Tensor:
        with self._precision():
            scored = self.model(batch.ids_BS, batch.floats_BN)
        logloss, loss = self._losses(scored, batch)
        guard(scored, batch, logloss=logloss)
        if (penalty := head_penalty(self.network.head, self.penalised)) is not None:
            loss = loss + penalty
        self.clock.lap("forward")
        loss.backward()  # type: ignore[no-untyped-call]
        return logloss.detach()

    def _in_parts(self, batch: Batch, guard: Guard) -> Tensor:
        """The head takes one part of the rows after the other; the tables see the step as one batch, and move once."""
        network, parts = self._network(), batch.parts(self.settings.accumulate)
        rows_BD, total = network.rows(batch.ids_BS), torch.zeros((), device=self.world.device)
        leaves = [
            leaf_BD.requires_grad_() for leaf_BD in torch.split(rows_BD.detach(), [len(part.ids_BS) for part in parts])
        ]
        for part, leaf_BD in zip(parts, leaves, strict=True):
            with self._precision():
                scored = network.score(leaf_BD, ids_BS=part.ids_BS, floats_BN=part.floats_BN)
            logloss, loss = self._losses(scored, part)
            guard(scored, part, logloss=logloss)
            self.clock.lap("forward")
            loss.backward()  # type: ignore[no-untyped-call]
            total += logloss.detach()
        if (penalty := head_penalty(network.head, self.penalised)) is not None:
            penalty.backward()  # type: ignore[no-untyped-call]
        torch.autograd.backward(rows_BD, torch.cat([torch.as_tensor(leaf_BD.grad) for leaf_BD in leaves]))
        average_gradients(self._dense_parameters())
        return total

    def _losses(self, scored: Scored, batch: Batch) -> tuple[Tensor, Tensor]:
        return mean_loss(scored, batch, task_weights_T=self.task_weights_T, ranks=self.world.size)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=self.settings.precision == "bf16")

    def _network(self) -> Network:
        """The network inside of what runs it on all ranks."""
        return cast(Network, self.model.module)

    def _dense_parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


def dense_optimizer(model: nn.Module, settings: Train, *, linear: OptimizerSettings | None) -> DenseOptimizer:
    """The optimizer of everything but the tables; `linear`, where given, that of first-order weights and their bias."""
    parameters = [value for name, value in model.named_parameters() if "tables.embedding_bags" not in name]
    first_order = {id(p) for module in model.modules() if isinstance(module, FirstOrder) for p in module.parameters()}
    own_settings = [linear if linear and id(value) in first_order else settings for value in parameters]
    groups = [
        ([value for value, chosen in zip(parameters, own_settings, strict=True) if chosen is own], own)
        for own in filter(None, (settings, linear))
    ]
    optimizer = DenseOptimizer([(values, own) for values, own in groups if values])
    if settings.weight_decay:
        optimizer.register_step_pre_hook(lambda o, a, k: _decay(parameters, settings, rate=optimizer.rate))
    return optimizer


def _decay(parameters: list[nn.Parameter], settings: Train, *, rate: float) -> None:
    """Decoupled weight decay (Loshchilov and Hutter 2019), the same for every optimizer."""
    with torch.no_grad():
        for value in parameters:
            value.mul_(1 - settings.learning_rate * rate * settings.weight_decay)
