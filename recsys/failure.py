"""Stops training where the loss goes wrong, says at which rows and which feature, and keeps that batch to look at."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from etl.artifact import Json, new_folder, read_json, write_json
from etl.faults import Fault
from etl.schema import Schema, read_schema
from recsys.data import Batch, Split
from recsys.experiment import read_experiment
from recsys.learner import Learner
from recsys.loss import row_losses
from recsys.models.head import Inputs
from recsys.network import Scored, build_network

_MARKER, _TENSORS = "failure.json", "batch.safetensors"
_BATCH = ("ids_BS", "floats_BN", "labels_BT", "groups_BG", "real_B", "weights_BT")
_SINGLE = ("emb_BFK", "linear_BL", "dense_BN", "entries_BEK")
_SEVERAL = ("sequences", "masks")
_NAMED_ROWS = 5
_WARM_UP_STEPS, _WARM_UP_BAR = 100, 100
_KEPT = 0.99
_CHANCE = math.log(2)


class LossGuard:
    """Looks at each batch's loss before anything moves; on CUDA, where looking means waiting, at each logged step: what
    is not finite in between is found before anything is saved or logged (`passed_unseen`).

    `usual` is the running mean of the logloss of this rank's rows. What is wrong: a loss that is not finite, or one of
    more than `train.spike` times the usual that is worse than a coin's.
    """

    def __init__(self, learner: Learner, schema: Schema, *, rows: Split, run: Path) -> None:
        self._learner, self._schema, self._rows, self._run = learner, schema, rows, run
        self._every = 1 if learner.world.device.type == "cpu" else learner.settings.log_every_steps
        self._rows_BD: Tensor | None = None
        self.usual: float | None = None
        self.step = 0
        learner.network.looked_up.register_forward_pre_hook(self._remember)

    def __call__(self, scored: Scored, batch: Batch, *, logloss: Tensor) -> None:
        """Raises Fault, after it wrote `failures/step-N-rank-R` into the run."""
        if self.step % self._every or not (real := float(batch.real_B.sum())):
            return
        loss = float(logloss.detach()) * batch.global_rows / self._learner.world.size / real
        if not math.isfinite(loss) or self._is_spike(loss):
            weights_T = self._learner.task_weights_T
            losses_B = row_losses(scored.logits_BT.detach(), batch, task_weights_T=weights_T).sum(dim=1)
            raise self._fault(loss, losses_B, batch=batch)
        self.usual = loss if self.usual is None else _KEPT * self.usual + (1 - _KEPT) * loss
        self._rows_BD = None  # lets them go before the next ones come

    def _is_spike(self, loss: float) -> bool:
        """In the first 100 steps, when losses still fall, the bar is a hundred times higher."""
        spike, chance = self._learner.settings.spike, _CHANCE * float(self._learner.task_weights_T.sum())
        if not spike:
            return False
        usual = chance if self.usual is None else self.usual
        return loss > max(spike * usual * (1 if self.step > _WARM_UP_STEPS else _WARM_UP_BAR), chance)

    def _remember(self, _: nn.Module, given: tuple[Tensor]) -> None:
        self._rows_BD = given[0].detach()

    def _fault(self, loss: float, losses_B: Tensor, *, batch: Batch) -> Fault:
        if self._rows_BD is None:
            raise RuntimeError("nothing was looked up")
        inputs = self._learner.network.read(self._rows_BD, ids_BS=batch.ids_BS, floats_BN=batch.floats_BN)
        ranked_B = torch.where(batch.real_B > 0, losses_B.nan_to_num(torch.inf, torch.inf), -torch.inf)
        worst = ranked_B.topk(min(_NAMED_ROWS, int(batch.real_B.sum()))).indices.tolist()
        broken = [at for at in worst if not math.isfinite(float(losses_B[at]))]
        bad = broken or [at for at in worst if float(losses_B[at]) > loss] or worst  # others are not to blame
        feature = self._blame(inputs, batch, bad=bad)
        numbers = [] if batch.numbers_B is None else batch.numbers_B[bad].tolist()
        places = [self._rows.place(number) for number in numbers]
        usual = "no usual loss yet" if self.usual is None else f"usually {self.usual:.4g}"
        folder = self._run / "failures" / f"step-{self.step}-rank-{self._learner.world.rank}"
        about = {"step": self.step, "loss": str(loss), "feature": feature, "rows": places, "positions": bad}
        tensors = {name: tensor.contiguous().clone() for name, tensor in self._tensors(inputs, batch)}
        folder.parent.mkdir(exist_ok=True)
        with new_folder(folder, marker=_MARKER) as beside:
            save_file(tensors, beside / _TENSORS)
            write_json(beside / _MARKER, about)
        got = f"a logloss of {loss:.4g} ({usual}); feature: {feature}; rows: {'; '.join(places) or 'unknown'}"
        remedy = f"look at that data, lower the learning rates, or set train.spike; the batch is kept in {folder}"
        return Fault(f"{self._run}: step {self.step}", got=got, wanted="a loss like those before", remedy=remedy)

    def _tensors(self, inputs: Inputs, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        yield from ((f"inputs.{name}", getattr(inputs, name)) for name in _SINGLE)
        yield from ((f"inputs.sequences.{at}", tensor) for at, tensor in enumerate(inputs.sequences))
        yield from ((f"inputs.masks.{at}", tensor) for at, tensor in enumerate(inputs.masks))
        for name in _BATCH:
            yield f"batch.{name}", getattr(batch, name)
        yield from ((f"head.{name}", tensor) for name, tensor in self._learner.network.head.state_dict().items())

    def _blame(self, inputs: Inputs, batch: Batch, *, bad: list[int]) -> str:
        """The first feature that is not finite in the bad rows; else that whose absence lowers their loss the most."""
        with torch.no_grad():
            for name, values_R in self._by_feature(inputs):
                if not torch.isfinite(values_R[bad]).all():
                    return f"'{name}' (not finite)"
            head = self._learner.network.head.eval()
            left = {}
            for name, changed in self._without(inputs):
                losses = row_losses(head(changed), batch, task_weights_T=self._learner.task_weights_T)[bad]
                left[name] = float(losses.sum().nan_to_num(torch.inf))
            head.train()
        name = min(left, key=lambda name: left[name], default="")
        return f"'{name}'" if left and math.isfinite(left[name]) else "none alone"

    def _by_feature(self, inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
        layout, dense = self._learner.network.layout, self._schema.dense_names
        yield from ((name, inputs.dense_BN[:, at]) for at, name in enumerate(dense))
        yield from ((name, inputs.emb_BFK[:, at].sum(dim=1)) for at, name in enumerate(layout.sizes.fields))
        for (name, _), values in zip(layout.sizes.sequences, inputs.sequences, strict=True):
            yield name, values.sum(dim=(1, 2))
        yield from ((f"first-order weight {at}", inputs.linear_BL[:, at]) for at in range(inputs.linear_BL.shape[1]))

    def _without(self, inputs: Inputs) -> Iterator[tuple[str, Inputs]]:
        """The inputs with one feature after the other at its median over the batch."""
        for at, name in enumerate(self._schema.dense_names):
            yield name, inputs._replace(dense_BN=_at_median(inputs.dense_BN, at))
        for at, name in enumerate(self._learner.network.layout.sizes.fields):
            yield name, inputs._replace(emb_BFK=_at_median(inputs.emb_BFK, at))


def passed_unseen(run: Path, *, step: int) -> Fault:
    """A loss that was not finite up to `step`, and moved weights before it was looked at."""
    got = "a loss that is not finite, at a step since the last line of metrics.jsonl or the last checkpoint"
    remedy = (
        "give the same command with --set train.log_every_steps=1, which goes on before it and names rows and feature"
    )
    return Fault(f"{run}: step {step}", got=got, wanted="finite losses; nothing was saved", remedy=remedy)


def refuse_broken(head: nn.Module, run: Path, *, step: int) -> None:
    """Raises Fault where a finite loss moved weights or statistics to what is not finite: that must not be saved."""
    if broken := [name for name, value in head.state_dict().items() if not bool(value.isfinite().all())]:
        got = f"weights of the head that are not finite: {', '.join(broken)}"
        remedy = "train anew with lower learning rates, or with train.clip_norm"
        raise Fault(f"{run}: step {step}", got=got, wanted="finite weights; nothing was saved", remedy=remedy)


def _at_median(values: Tensor, at: int) -> Tensor:
    changed = values.clone()
    changed[:, at] = values[:, at].median(dim=0).values
    return changed


def replay_text(run: Path, failure: Path) -> str:
    """What stopped a run, and the named rows with their losses computed again."""
    losses_B, about = replay(run, failure), _about(failure)
    lines = [f"{failure}: step {about['step']}, a logloss of {about['loss']}; feature: {about['feature']}"]
    unknown = ["a row that is not known"] * len(about["positions"])
    for position, place in zip(about["positions"], about["rows"] or unknown, strict=True):
        lines.append(f"row {position} of the batch: logloss {float(losses_B[position]):.6g}, {place}")
    finite_B = losses_B[losses_B.isfinite()]
    median = f"{float(finite_B.median()):.6g}" if len(finite_B) else "none"
    lines.append(f"all {len(losses_B):,} rows: {len(losses_B) - len(finite_B):,} not finite, median logloss {median}")
    return "\n".join(lines)


def _about(failure: Path) -> Json:
    found: Json = read_json(failure / _MARKER, remedy="name a folder below 'failures' of a run that stopped")
    return found


def replay(run: Path, failure: Path) -> Tensor:
    """The logloss of each row of a kept batch [B], computed again from the files alone.

    Raises:
        Fault: `failure` is no folder that a stopped run left.
    """
    _about(failure)
    kept, schema = load_file(failure / _TENSORS), read_schema(run)
    head = build_network(read_experiment(run), schema, table_device="meta").head.eval()
    head.load_state_dict({name.removeprefix("head."): t for name, t in kept.items() if name.startswith("head.")})
    sequences, masks = (
        [kept[name] for name in sorted(kept) if name.startswith(f"inputs.{part}.")] for part in _SEVERAL
    )
    emb_BFK, linear_BL, dense_BN, entries_BEK = (kept[f"inputs.{name}"] for name in _SINGLE)
    inputs = Inputs(emb_BFK, linear_BL, dense_BN, entries_BEK, tuple(sequences), tuple(masks))
    ids_BS, floats_BN, labels_BT, groups_BG, real_B, weights_BT = (kept[f"batch.{name}"] for name in _BATCH)
    batch = Batch(ids_BS, floats_BN, labels_BT, groups_BG, real_B, weights_BT, global_rows=len(real_B))
    weights_T = torch.tensor([task.weight for task in schema.tasks])
    with torch.no_grad():
        return row_losses(head(inputs), batch, task_weights_T=weights_T).sum(dim=1)
