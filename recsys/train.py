"""Training, from a dataset folder to `result.json`."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.utils import clip_grad_norm_

from etl.artifact import Json, read_json, seed_of, write_json
from etl.faults import Fault
from etl.schema import Schema
from recsys.checkpoint import Progress, best, latest, save_checkpoint
from recsys.data import Batch, Slice, Split, open_dataset
from recsys.evaluate import evaluate_model, write_predictions
from recsys.experiment import EarlyStop, Experiment, Train
from recsys.machine import check_compiler
from recsys.metrics import Metrics
from recsys.models.fnn import FNNConfig
from recsys.models.head import Head
from recsys.models.layers import FirstOrder, half_squares
from recsys.network import Scored, build_network
from recsys.optim import DenseOptimizer, OptimizerSettings
from recsys.parallel.shard import shard
from recsys.parallel.state import restore, restore_weights
from recsys.parallel.world import World, barrier, mean_over_ranks, open_world
from recsys.run_folder import MetricsFile, open_run
from recsys.warm_start import start_from_fm

Report = Callable[[Json], None]


def train(experiment: Experiment, *, data: Path, run: Path, report: Report) -> Json:
    """Trains until the epochs are over or validation stops gaining; the same call goes on after a crash.

    `report` hears of each logged step and evaluation, on rank 0. Returns what `result.json` holds.

    Raises:
        Fault: the dataset folder is stale or broken, or the run folder is another experiment's.
    """
    schema = open_dataset(data, experiment.data_hash())
    with open_world(experiment.train.device) as world:
        if world.rank == 0:
            open_run(run, experiment, schema=schema, data=data)
        barrier()
        trainer = Trainer(experiment, schema, data=data, run=run, world=world, report=report)
        trainer.resume()
        while not trainer.progress.finished:
            for batch in trainer.rest_of_epoch():
                trainer.step(batch)
                trainer.log_if_due()
                trainer.evaluate_if_due()
                trainer.save_if_due()
            trainer.end_epoch()
        return trainer.finish()


class Trainer:
    """What changes while a model learns."""

    def __init__(
        self, experiment: Experiment, schema: Schema, *, data: Path, run: Path, world: World, report: Report
    ) -> None:
        self.experiment, self.schema = experiment, schema
        self.settings, self.run, self.world, self.report = experiment.train, run, world, report
        self.tasks, self.progress = schema.task_names, Progress(seed=experiment.seed)
        self.splits = {name: Split(data / name, schema) for name in ("train", "valid", "test")}
        self.mine = Slice(world.rank, world.size, self.settings.batch_size)
        self.network = build_network(experiment, schema, table_device="meta")
        if self.settings.compile == "inductor":
            check_compiler(self.settings)
            self.network.compile_dense()
        self.sharded = shard(self.network, experiment.embedding, world=world, seed=experiment.seed)
        self.model = self.sharded.model
        self.optimizer = dense_optimizer(self.model, self.settings, linear=experiment.embedding.linear)
        self.penalised = penalised_layers(self.network.head, self.settings.layer_l2)
        self.task_weights_T = torch.tensor([task.weight for task in schema.tasks], device=world.device)
        self._loss, self._summed, self._saved_step = torch.zeros((), device=world.device), 0, -1
        self._began, self._seconds_before, self._rows_before = time.monotonic(), 0.0, 0

    def resume(self) -> None:
        """From the newest checkpoint, where there is one; later lines of metrics.jsonl are written again."""
        found = latest(self.run)
        if found:
            folder, self.progress = found
            restore(folder, self.sharded, optimizer=self.optimizer)
            self._saved_step = self.progress.step
            self._set_rates()
        elif isinstance(self.experiment.model, FNNConfig) and (fm := self.experiment.model.init_from_fm):
            start_from_fm(self.sharded, self.network, schema=self.schema, run=Path(fm))
        self._seconds_before, self._rows_before = self.progress.seconds, self.progress.rows
        if self.world.rank == 0:
            self.lines = MetricsFile(self.run, last_step=self.progress.step)

    def rest_of_epoch(self) -> Any:
        """This rank's batches from where the epoch stands."""
        p = self.progress
        return self.splits["train"].shuffled(self.mine, seed=p.seed, epoch=p.epoch, start=p.position)

    def step(self, batch: Batch) -> None:
        """One update of tables (inside the backward pass) and dense weights."""
        p = self.progress
        torch.manual_seed(seed_of(p.seed, p.step, self.world.rank))
        self.sharded.begin_step(p.step + 1)
        own = batch.to(self.world.device)
        with torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=self.settings.precision == "bf16"):
            scored = self.model(own.ids_BS, own.floats_BN)
        logloss, loss = mean_loss(scored, own, task_weights_T=self.task_weights_T, ranks=self.world.size)
        if (penalty := head_penalty(self.network.head, self.penalised)) is not None:
            loss = loss + penalty
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if self.settings.clip_norm:
            clip_grad_norm_(
                [p for group in self.optimizer.param_groups for p in group["params"]], self.settings.clip_norm
            )
        self.optimizer.step()
        self._loss += logloss.detach()
        self._summed += 1
        self._advance(step=p.step + 1, position=p.position + batch.global_rows, rows=p.rows + batch.global_rows)

    def log_if_due(self) -> None:
        """Each `log_every_steps`: the mean loss since the last line."""
        if self.progress.step % self.settings.log_every_steps == 0 or self.progress.step == 1:
            self._log({})

    def evaluate_if_due(self) -> None:
        """Each `eval_every_steps`, where set; the end of an epoch evaluates by itself."""
        every, ended = self.settings.eval_every_steps, self.progress.position >= self.splits["train"].rows
        if every and self.progress.step % every == 0 and not ended and self._evaluate():
            self._save(again=True)

    def save_if_due(self) -> None:
        """Each `checkpoint_every_steps`, where set."""
        every = self.settings.checkpoint_every_steps
        if every and self.progress.step % every == 0:
            self._save()

    def end_epoch(self) -> None:
        """Evaluates, decides whether to stop, saves."""
        last = self.progress.epoch + 1 >= self.settings.epochs
        self._advance(epoch=self.progress.epoch + 1, position=0)
        self._evaluate()
        stop = last or self.progress.without_gain >= self.settings.early_stop.patience
        self._advance(finished=stop)
        self._save(again=True)

    def finish(self) -> Json:
        """The best weights' metrics on validation and test rows, written once."""
        path = self.run / "result.json"
        if path.is_file():
            found: Json = read_json(path, remedy="delete it and run the command again")
            return found
        restore_weights(best(self.run), self.sharded)
        p = self.progress
        result: Json = {"steps": p.step, "rows": p.rows, "seconds": p.seconds, "best_step": p.best_step}
        result["rows_per_second"] = p.rows / max(p.seconds, 1e-9)
        for split in ("valid", "test"):
            result[split], table = self._scores(split)
            if self.world.rank == 0:
                write_predictions(self.run, split, table=table)
        if self.world.rank == 0:
            write_json(path, result)
        barrier()
        return result

    def _evaluate(self) -> bool:
        """Logs the validation metrics; whether they are the best so far."""
        metrics, _ = self._scores("valid")
        better = improves(metrics, self.tasks, best=self.progress.best, rule=self.settings.early_stop)
        if better is None:
            p = self.progress
            self._advance(without_gain=p.without_gain + 1, since_cut=p.since_cut + 1)
        else:
            self._advance(best=better, best_step=self.progress.step, without_gain=0, since_cut=0)
        self._lower_rates_if_due()
        self._log({f"valid/{name}": value for name, value in metrics.items()})
        return better is not None

    def _lower_rates_if_due(self) -> None:
        """After `plateau.patience` evaluations without a gain, at most `plateau.times`."""
        p, plateau = self.progress, self.settings.plateau
        if plateau and p.since_cut >= plateau.patience and p.cuts < plateau.times:
            self._advance(cuts=p.cuts + 1, since_cut=0)
            self._set_rates()

    def _set_rates(self) -> None:
        if self.settings.plateau:
            self.optimizer.rate = self.settings.plateau.factor**self.progress.cuts
            self.sharded.scale_rate(self.optimizer.rate)

    def _scores(self, split: str) -> tuple[Metrics, Any]:
        rows, batch_size = self.splits[split], self.settings.batch_size
        return evaluate_model(self.model, rows, tasks=self.tasks, world=self.world, batch_size=batch_size)

    def _save(self, *, again: bool = False) -> None:
        if again or self._saved_step != self.progress.step:
            keep = self.settings.keep
            save_checkpoint(
                self.run, self.progress, sharded=self.sharded, optimizer=self.optimizer, world=self.world, keep=keep
            )
            self._saved_step = self.progress.step

    def _log(self, metrics: Metrics) -> None:
        loss = mean_over_ranks(self._loss / max(self._summed, 1)) if self._summed else None
        self._loss.zero_()
        self._summed = 0
        p = self.progress
        record = {"step": p.step, "epoch": p.epoch, "rows": p.rows, "seconds": p.seconds, "loss": loss} | metrics
        if self.world.rank == 0:
            self.lines.add({name: value for name, value in record.items() if value is not None})
            seconds = max(p.seconds - self._seconds_before, 1e-9)
            record["rows_per_second"] = (p.rows - self._rows_before) / seconds
            record["total_rows"] = self.splits["train"].rows * self.settings.epochs
            self.report(record)

    def _advance(self, **changes: float | int | bool) -> None:
        seconds = self._seconds_before + time.monotonic() - self._began
        self.progress = self.progress.model_copy(update=changes | {"seconds": seconds})


def mean_loss(scored: Scored, batch: Batch, *, task_weights_T: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """This rank's share of the step's mean logloss, and the same with the penalty on activations, both times the ranks.

    Gradients are averaged over ranks afterwards. A task's mean is over all rows, also those that its condition leaves
    out; the penalty is a sum over rows, as published.
    """
    loss_BT = binary_cross_entropy_with_logits(scored.logits_BT.float(), batch.labels_BT, reduction="none")
    logloss = (loss_BT * batch.weights_BT * task_weights_T).sum() * (ranks / batch.global_rows)
    return logloss, logloss + (scored.penalty_B * batch.real_B).sum() * ranks


def penalised_layers(head: Head, layer_l2: float | list[float]) -> list[tuple[nn.Linear, float]]:
    """The linear layers that `layer_l2` regularises, each with its factor; a list gives one for each in their order.

    Raises:
        Fault: another number of layers than of values.
    """
    layers = [module for module in head.modules() if isinstance(module, nn.Linear)]
    factors = layer_l2 if isinstance(layer_l2, list) else [layer_l2] * len(layers)
    if len(factors) != len(layers):
        got, wanted = f"{len(factors)} values", f"one number, or one for each of the {len(layers)} linear layers"
        raise Fault("train.layer_l2", got=got, wanted=wanted, remedy="give as many values as layers")
    return [(layer, l2) for layer, l2 in zip(layers, factors, strict=True) if l2]


def head_penalty(head: Head, layers: list[tuple[nn.Linear, float]]) -> Tensor | None:
    """The regularisers of the head's own weights: those of `penalised_layers`, and what the model adds."""
    terms = [half_squares([layer.weight]) * l2 for layer, l2 in layers]
    if (own := head.penalty()) is not None:
        terms.append(own)
    return torch.stack(terms).sum() if terms else None


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


def improves(metrics: Metrics, tasks: list[str], *, best: float | None, rule: EarlyStop) -> float | None:
    """The mean figure over tasks where it beats `best` (higher is better, so logloss counts negative), else None."""
    names = [f"{task}/{rule.metric}" if len(tasks) > 1 else rule.metric for task in tasks]
    values = [value for name in names if isinstance(value := metrics[name], float)]
    figure = sum(values) / len(values) if values else 0.0
    figure = -figure if rule.metric == "logloss" else figure
    return figure if best is None or figure > best else None
