"""Training, from a dataset folder to `result.json`."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from etl.artifact import Json, read_json, seed_of, write_json
from etl.schema import Schema
from recsys.checkpoint import Checkpoints, Progress, best
from recsys.clock import gpu_memory_gb, memory_gb, milliseconds, own_work
from recsys.data import Batch, Slice, Split, open_dataset
from recsys.evaluate import evaluate_model, write_predictions
from recsys.experiment import EarlyStop, Experiment
from recsys.failure import LossGuard, passed_unseen, refuse_broken
from recsys.learner import Learner
from recsys.machine import give_back_memory
from recsys.metrics import Metrics
from recsys.parallel.pipeline import IdsAhead
from recsys.parallel.shard import training_plan
from recsys.parallel.state import restore, restore_weights
from recsys.parallel.world import average_buffers, barrier, from_all, from_first, mean_over_ranks, open_world
from recsys.run_folder import MetricsFile, open_run
from recsys.table_use import table_uses
from recsys.tensorboard import EventFile, require_tensorboard
from recsys.warm_start import start_from

Report = Callable[[Json], None]


def train(experiment: Experiment, *, data: Path, run: Path, report: Report) -> Json:
    """Trains until the epochs are over or validation stops gaining; the same call goes on after a crash.

    `report` hears of each logged step and evaluation, on rank 0. Returns what `result.json` holds.

    Raises:
        Fault: the dataset folder is stale or broken, the run folder is another experiment's, a package is missing, or
            a rank has less memory than the plan says.
    """
    schema, settings = open_dataset(data, experiment.data_hash()), experiment.train
    if settings.tensorboard:
        require_tensorboard()
    with open_world(settings.device, dead_after_s=settings.dead_after_s) as world:
        ended = from_first((run / "result.json").is_file())
        plan = None if ended else training_plan(experiment, schema, world=world)  # refuses what does not fit
        if world.rank == 0:
            open_run(run, experiment, schema=schema, data=data)
        barrier()
        if plan is None:
            return _result_of(run)
        learner = Learner(experiment, schema, world=world, plan=plan)
        with Checkpoints(run, world=world, keep=settings.keep) as checkpoints:
            trainer = Trainer(experiment, schema, data=data, checkpoints=checkpoints, learner=learner, report=report)
            trainer.resume()
            while not trainer.progress.finished:
                for batch in trainer.rest_of_epoch():
                    trainer.step(batch)
                    trainer.log_if_due()
                    trainer.evaluate_if_due()
                    trainer.save_if_due()
                trainer.end_epoch()
            return trainer.finish()


def _result_of(run: Path) -> Json:
    found: Json = read_json(run / "result.json", remedy="delete it and run the command again")
    return found


class Trainer:
    """What changes while a model learns."""

    def __init__(
        self,
        experiment: Experiment,
        schema: Schema,
        *,
        data: Path,
        checkpoints: Checkpoints,
        learner: Learner,
        report: Report,
    ) -> None:
        self.experiment, self.schema, self.settings = experiment, schema, experiment.train
        self.checkpoints, self.run, self.report = checkpoints, checkpoints.run, report
        self.learner, self.world = learner, learner.world
        self.tasks, self.progress = schema.task_names, Progress(seed=experiment.seed)
        gpu = self.world.device.type == "cuda"
        self.splits = {name: Split(data / name, schema, pinned=gpu) for name in ("train", "valid", "test")}
        self.mine = Slice(self.world.rank, self.world.size, self.settings.rank_rows)
        several = self.world.size > 1 or learner.sharded.cached
        self.ids_ahead = IdsAhead(learner.sharded, clock=learner.clock) if several else None
        self.guard = LossGuard(self.learner, schema, rows=self.splits["train"], run=self.run)
        self.events: EventFile | None = None
        self._loss, self._saved_step = torch.zeros((), device=self.world.device), -1
        self._began, self._seconds_before, self._rows_before = time.monotonic(), 0.0, 0

    def resume(self) -> None:
        """From the newest checkpoint, where there is one; later lines of metrics.jsonl are written again."""
        learner = self.learner
        found = self.checkpoints.newest()
        if found:
            folder, self.progress = found
            restore(folder, learner.sharded, optimizer=learner.optimizer)
            self._saved_step, self.guard.usual = self.progress.step, self.progress.usual_loss
            self._set_rates()
        elif self.experiment.starts_from:
            self._advance(steps_before=start_from(learner, self.experiment, schema=self.schema, run=self.run))
        self._seconds_before, self._rows_before = self.progress.seconds, self.progress.rows
        if self.world.rank == 0:
            self.lines = MetricsFile(self.run, last_step=self.progress.step)
            if self.settings.tensorboard:
                self.events = EventFile(self.run, last_step=self.progress.step)

    def rest_of_epoch(self) -> Any:
        """This rank's batches from where the epoch stands."""
        p = self.progress
        batches = self.splits["train"].shuffled(self.mine, seed=p.seed, epoch=p.epoch, start=p.position)
        return self.ids_ahead.batches(batches) if self.ids_ahead else batches

    def step(self, batch: Batch) -> None:
        """One update of tables (inside the backward pass) and dense weights."""
        p = self.progress
        draws = torch.default_generator if self.world.device.type == "cpu" else torch  # which seeds all, in 0.5 ms
        draws.manual_seed(seed_of(p.seed, p.step, self.world.rank))
        self.guard.step = p.step + 1
        table_step = p.steps_before + p.step + 1
        self._loss += self.learner.update(batch.to(self.world.device), step=table_step, guard=self.guard)
        position, rows = p.position + batch.global_rows, p.rows + batch.global_rows
        self._advance(step=p.step + 1, position=position, rows=rows, loss_steps=p.loss_steps + 1)

    def log_if_due(self) -> None:
        """Each `log_every_steps`: the mean loss since the last line."""
        if self.progress.step % self.settings.log_every_steps == 0 or self.progress.step == 1:
            self._log({})

    def evaluate_if_due(self) -> None:
        """Each `eval_every_steps`, where set; the end of an epoch evaluates by itself."""
        if self._is_due(self.settings.eval_every_steps) and self._evaluate():
            self._save()

    def save_if_due(self) -> None:
        """Each `checkpoint_every_steps`, where set; the end of an epoch saves by itself."""
        if self._is_due(self.settings.checkpoint_every_steps) and self._saved_step != self.progress.step:
            self._save()

    def end_epoch(self) -> None:
        """Evaluates, decides whether to stop, saves."""
        last = self.progress.epoch + 1 >= self.settings.epochs
        self._advance(epoch=self.progress.epoch + 1, position=0)
        self._evaluate()
        stop = last or self.progress.without_gain >= self.settings.early_stop.patience
        self._advance(finished=stop)
        self._save()

    def finish(self) -> Json:
        """The best weights' metrics on validation and test rows, written once."""
        if self.events:
            self.events.close()
        self.checkpoints.wait()
        p = self.progress
        if p.best_step != p.step:
            restore_weights(best(self.run), self.learner.sharded)
        result: Json = {"steps": p.step, "rows": p.rows, "seconds": p.seconds, "best_step": p.best_step}
        result["rows_per_second"] = p.rows / max(p.seconds, 1e-9)
        for split in ("valid", "test"):
            result[split], table = self._scores(split)
            if self.world.rank == 0:
                write_predictions(self.run, split, table=table)
        give_back_memory()  # of batches: counts take its place
        uses = table_uses(self.schema, self.splits["train"].groups, world=self.world)
        if self.world.rank == 0:
            write_json(self.run / "tables.json", {name: use.model_dump() for name, use in uses.items()})
            write_json(self.run / "result.json", result)
        barrier()
        return result

    def _is_due(self, every: int | None) -> bool:
        ended = self.progress.position >= self.splits["train"].rows
        return bool(every) and self.progress.step % (every or 1) == 0 and not ended

    def _evaluate(self) -> bool:
        """Logs the validation metrics; whether they are the best so far."""
        self._sum_losses()  # tells whether there is a model to evaluate
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
            self.learner.set_rate(self.settings.plateau.factor**self.progress.cuts)

    def _scores(self, split: str) -> tuple[Metrics, Any]:
        average_buffers(self.learner.network.head)  # one model on all ranks, as it is saved
        with self.ids_ahead.paused() if self.ids_ahead else nullcontext():
            scored = evaluate_model(
                self.learner.model,
                self.splits[split],
                tasks=self.tasks,
                world=self.world,
                batch_size=self.settings.batch_size,
                place=f"{self.run}: step {self.progress.step}",
            )
        self.learner.clock.lap("evaluation")
        return scored

    def _save(self) -> None:
        average_buffers(self.learner.network.head)
        self._sum_losses()
        refuse_broken(self.learner.network.head, self.run, step=self.progress.step)
        self._advance(usual_loss=self.guard.usual)
        self.checkpoints.save(self.progress, sharded=self.learner.sharded, optimizer=self.learner.optimizer)
        self._saved_step = self.progress.step
        self.learner.clock.lap("checkpoint")

    def _log(self, metrics: Metrics) -> None:
        self._sum_losses()
        p, laps = self.progress, self.learner.clock.read()
        of_ranks = from_all((own_work(laps), memory_gb(), gpu_memory_gb(self.world.device)))
        record = {"step": p.step, "epoch": p.epoch, "rows": p.rows, "seconds": p.seconds} | metrics
        record["loss"] = p.loss_sum / p.loss_steps if p.loss_steps else None
        if self.world.rank == 0:
            work, host, gpu = zip(*of_ranks, strict=True)
            seconds = max(p.seconds - self._seconds_before, 1e-9)
            record["rows_per_second"] = (p.rows - self._rows_before) / seconds
            record |= milliseconds(laps, steps=p.loss_steps)
            record |= {"memory_gb": max(host)} | ({"gpu_memory_gb": max(gpu)} if any(gpu) else {})
            record |= {"imbalance": max(work) * len(work) / sum(work)} if sum(work) else {}
            line = {name: value for name, value in record.items() if value is not None}
            self.lines.add(line)
            if self.events:
                self.events.add(line)
            record["total_rows"] = self.splits["train"].rows * self.settings.epochs
            self.report(record)
        self._advance(loss_sum=0.0, loss_steps=0)
        self.learner.clock.lap("log")

    def _sum_losses(self) -> None:
        """From each rank's device into the progress: at each line and each save, so also where one was killed.

        Raises:
            Fault: one was not finite, at a step that the guard did not look at: what it moved must not be saved.
        """
        loss = mean_over_ranks(self._loss)
        if not math.isfinite(loss):
            raise passed_unseen(self.run, step=self.progress.step)
        self._advance(loss_sum=self.progress.loss_sum + loss)
        self._loss.zero_()

    def _advance(self, **changes: float | int | bool | None) -> None:
        seconds = self._seconds_before + time.monotonic() - self._began
        self.progress = self.progress.model_copy(update=changes | {"seconds": seconds})


def improves(metrics: Metrics, tasks: list[str], *, best: float | None, rule: EarlyStop) -> float | None:
    """The mean figure over tasks where it beats `best` (higher is better, so logloss counts negative), else None."""
    names = [f"{task}/{rule.metric}" if len(tasks) > 1 else rule.metric for task in tasks]
    values = [value for name in names if isinstance(value := metrics[name], float)]
    figure = sum(values) / len(values) if values else 0.0
    figure = -figure if rule.metric == "logloss" else figure
    return figure if best is None or figure > best else None
