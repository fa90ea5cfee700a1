"""Training on a GPU against the same training on the CPU."""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import Tensor

from etl.artifact import Json
from etl.schema import read_schema
from recsys.clock import Clock
from recsys.data import Slice, Split
from recsys.evaluate import evaluate
from recsys.experiment import Embedding, Experiment
from recsys.models import MODELS
from recsys.parallel.pipeline import IdsAhead
from recsys.parallel.world import open_world
from recsys.train import train
from tests.e2e.test_ranks import Run
from tests.recsys.test_rows import OPTIMIZERS, Trained
from tests.registry import config_of, rich_schema

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("quiet")]

STEPS = 3


def steps_on(device: str, kind: str, *, optimizer: str) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of a few steps without dropout, whose masks differ by device, and the tables after them."""
    embedding = Embedding.model_validate({"dim": 8, "init_std": 0.3} | OPTIMIZERS[optimizer])
    with open_world(device) as world:
        trained = Trained(config_of(kind), embedding, schema=rich_schema(), world=world, std=0.05)
        trained.sharded.model.eval()
        return [trained.step(step) for step in range(1, STEPS + 1)], trained.tables()


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_model_takes_the_steps_of_the_cpu(kind: str, optimizer: str) -> None:
    on_cpu, on_gpu = (steps_on(device, kind, optimizer=optimizer) for device in ("cpu", "cuda"))
    assert on_gpu[0] == pytest.approx(on_cpu[0], rel=1e-5)
    for table, rows in on_cpu[1].items():
        torch.testing.assert_close(
            on_gpu[1][table],
            rows,
            rtol=0,
            atol=1e-3 if optimizer == "adam" else 1e-4,
            msg=f"{table}: {(on_gpu[1][table] - rows).abs().max():.1e}",
        )


def test_batches_lie_in_memory_that_the_gpu_reads_and_arrive_as_they_are(dataset: Path) -> None:
    schema = read_schema(dataset)
    plain, pinned = (
        next(iter(Split(dataset / "train", schema, pinned=on).in_file_order(Slice(0, 1, 64)))) for on in (False, True)
    )
    arrived = pinned.to(torch.device("cuda"))
    for name in ("ids_BS", "floats_BN", "labels_BT", "groups_BG", "real_B", "weights_BT"):
        assert not getattr(plain, name).is_pinned() and getattr(pinned, name).is_pinned()
        torch.testing.assert_close(getattr(arrived, name).cpu(), getattr(plain, name), rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["wide_deep", "dcnv2"])
def test_a_known_signal_is_learnt_on_either(
    kind: str, precision: str, dataset: Path, tmp_path: Path, experiment: Callable[..., Experiment]
) -> None:
    """A checkpoint made on the GPU also gives the same figures on the CPU."""

    def learn(device: str, run: Path) -> Json:
        settings = experiment(
            model=MODELS[kind](),
            train={"epochs": 8, "learning_rate": 0.01, "device": device, "precision": precision},
            embedding={"learning_rate": 0.1},
        )
        return train(settings, data=dataset, run=run, report=lambda record: None)

    on_gpu, on_cpu = learn("cuda", tmp_path / "gpu"), learn("cpu", tmp_path / "cpu")
    assert on_gpu["test"]["auc"] == pytest.approx(on_cpu["test"]["auc"], abs=0.01)
    assert on_gpu["test"]["auc"] > 0.78
    assert '"gpu_memory_gb"' in (tmp_path / "gpu" / "metrics.jsonl").read_text()
    described = tmp_path / "gpu" / "experiment.json"
    described.write_text(described.read_text().replace('"cuda"', '"cpu"').replace('"bf16"', '"fp32"'))
    found = evaluate(tmp_path / "gpu", data=dataset, split="test")
    assert found is not None
    assert found["auc"] == pytest.approx(on_gpu["test"]["auc"], abs=1e-5 if precision == "fp32" else 2e-3)


def test_a_run_goes_on_where_it_was_killed(
    dataset: Path, tmp_path: Path, experiment: Callable[..., Experiment]
) -> None:
    """Stopped after one of two epochs and taken up again: the result of the run that never stopped."""
    train_section = {"device": "cuda", "epochs": 2, "checkpoint_every_steps": 10}
    settings = experiment(train=train_section)
    whole = train(settings, data=dataset, run=tmp_path / "whole", report=lambda record: None)

    class Killed(Exception):
        pass

    def kill(record: Json) -> None:
        if record["step"] >= 35:
            raise Killed

    with pytest.raises(Killed):
        train(settings, data=dataset, run=tmp_path / "cut", report=kill)
    rest = train(settings, data=dataset, run=tmp_path / "cut", report=lambda record: None)
    assert rest["steps"] == whole["steps"]
    assert rest["test"]["auc"] == pytest.approx(whole["test"]["auc"], abs=1e-4)


def cached_losses(*, placement: str, ahead: bool) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of steps whose caches hold a few rows of each table, with an evaluation after every other step."""
    embedding = OPTIMIZERS["rowwise_adagrad"] | {"placement": placement, "cache_share": 0.1}
    with open_world("cuda") as world:
        run = Run(config_of("deepfm", hidden=[8]), embedding, schema=rich_schema(), world=world, seed=1)
        assert bool(run.sharded.cached) == (placement == "uvm_caching")
        batches = [run.batch(step) for step in range(1, 4 * STEPS)]
        ids_ahead = IdsAhead(run.sharded, clock=Clock()) if ahead else None
        losses = []
        epochs = [ids_ahead.batches(iter(part)) if ids_ahead else part for part in (batches[:STEPS], batches[STEPS:])]
        for step, _ in enumerate(chain(*epochs), start=1):
            losses.append(run.step(step))
            if step % 2:
                with ids_ahead.paused() if ids_ahead else nullcontext():
                    run.logits()
                run.model.train()
        return losses, {name: part for name, parts in run.held()["shards"].items() for _, part in parts}


def test_rows_fetched_ahead_into_the_cache_are_those_without_and_those_of_gpu_memory() -> None:
    found = [
        cached_losses(placement=placement, ahead=ahead)
        for placement, ahead in (("hbm", False), ("uvm_caching", False), ("uvm_caching", True))
    ]
    for losses, tables in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-5)
        for name, rows in found[0][1].items():
            torch.testing.assert_close(tables[name].cpu(), rows.cpu(), rtol=0, atol=1e-5, msg=name)


def test_a_run_behind_a_cache_evaluates_saves_and_ends_as_one_in_gpu_memory(
    dataset: Path, tmp_path: Path, experiment: Callable[..., Experiment]
) -> None:
    """The best weights, loaded at the end, are not hidden by those of the last step in the cache."""
    results = []
    for placement in ("hbm", "uvm_caching"):
        settings = experiment(
            train={"device": "cuda", "epochs": 2, "eval_every_steps": 7, "checkpoint_every_steps": 5},
            embedding={"placement": placement, "cache_share": 0.1},
        )
        results.append(train(settings, data=dataset, run=tmp_path / placement, report=lambda record: None))
    in_memory, cached = results
    assert cached["best_step"] == in_memory["best_step"]
    assert cached["test"]["auc"] == pytest.approx(in_memory["test"]["auc"], abs=1e-4)
    assert cached["test"]["logloss"] == pytest.approx(in_memory["test"]["logloss"], rel=1e-4)
