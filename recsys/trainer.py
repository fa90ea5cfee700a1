"""One rank's model and optimizers, and what a step does with them."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from etl.artifact import digest
from etl.schema import Schema
from recsys.batch import Batch
from recsys.experiment import Experiment, Train
from recsys.metrics import Scored
from recsys.network import build_network
from recsys.parallel import state
from recsys.parallel.shard import shard
from recsys.parallel.world import World, gather_steps

_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}


class Trainer:
    """The sharded network of an experiment, freshly initialised. The tables' optimizer runs in the backward pass."""

    def __init__(self, experiment: Experiment, schema: Schema, *, world: World) -> None:
        self._section, self._seed, self._world = experiment.train, experiment.seed, world
        network = build_network(experiment, schema, table_device="meta")
        self._model = shard(network, experiment.embedding, world=world, seed=experiment.seed)
        self._dense = list(network.head.parameters())
        self._optimizer = _dense_optimizer(self._section, self._dense)
        state.prime(self._optimizer)

    def step(self, batch: Batch, *, number: int) -> Tensor:
        """One update; this rank's share of the loss, left on the device.

        Torch is reseeded from seed, step and rank, so that a resumed run draws the dropout of an unbroken one.
        """
        torch.manual_seed(int(digest([self._seed, number, self._world.rank])[:15], 16))
        self._model.train()
        batch = batch.to(self._world.device)
        self._optimizer.zero_grad()
        loss = self._loss(batch)
        loss.backward()
        if self._section.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._dense, self._section.clip_norm)
        self._decay()
        self._optimizer.step()
        return loss.detach()

    def score(self, batches: Iterable[Batch]) -> Scored:
        """Logits and labels of a split on every rank, in file order whatever the number of ranks."""
        self._model.eval()
        kept = []
        with torch.no_grad():
            for batch in batches:
                here = batch.to(self._world.device)
                kept.append(torch.cat([self._logits_BT(here), here.labels_BT, here.weights_B[:, None]], dim=1))
        rows = gather_steps(torch.stack(kept)).cpu().double()
        real = rows[rows[:, -1] > 0, :-1].numpy()
        tasks = real.shape[1] // 2
        return Scored(real[:, :tasks], real[:, tasks:])

    def save(self, folder: Path) -> None:
        """Weights and optimizer states of all ranks."""
        state.save(folder, self._model, optimizer=self._optimizer)

    def restore(self, folder: Path) -> None:
        """What `save` wrote, on any number of ranks."""
        state.restore(folder, self._model, optimizer=self._optimizer)

    def _logits_BT(self, batch: Batch) -> Tensor:
        bf16 = self._section.precision == "bf16"
        with torch.autocast(self._world.device.type, torch.bfloat16, enabled=bf16):
            logits_BT: Tensor = self._model(batch.ids_BF, batch.dense_BN)
        return logits_BT.float()

    def _loss(self, batch: Batch) -> Tensor:
        """Summed over tasks, mean over the rows of all ranks.

        Times the number of ranks: torchrec and DDP average gradients over the ranks, so the update is that of one rank
        with all the rows.
        """
        rows_BT = binary_cross_entropy_with_logits(self._logits_BT(batch), batch.labels_BT, reduction="none")
        return (rows_BT.sum(dim=1) @ batch.weights_B) * (self._world.size / batch.global_rows)

    @torch.no_grad()
    def _decay(self) -> None:
        """Decoupled weight decay (Loshchilov and Hutter 2019), whatever the optimizer."""
        if self._section.weight_decay:
            shrink = 1 - self._section.learning_rate * self._section.weight_decay
            for parameter in self._dense:
                parameter.mul_(shrink)


def _dense_optimizer(section: Train, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return _OPTIMIZERS[section.optimizer](parameters, lr=section.learning_rate)  # type: ignore[call-arg]
