"""Training, from a dataset folder to a result; the same call goes on where a killed one stopped."""

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from etl.artifact import write_json
from recsys import checkpoint, run_folder
from recsys.batch import Batch
from recsys.data import Slice, Split, open_dataset
from recsys.display import Display, display
from recsys.experiment import Experiment, Train
from recsys.metrics import Figures, figures
from recsys.parallel.world import World, barrier, mean_over_ranks, open_world
from recsys.progress import Progress
from recsys.trainer import Trainer


def train(experiment: Experiment, *, data: Path, run: Path) -> None:
    """Trains until the last epoch or an early stop, and writes `run/result.json` with the best weights' figures.

    Raises:
        Fault: the data was made from another feature spec, a shard is broken, or `run` is another experiment's.
    """
    settings = experiment.train
    with open_world(settings.device) as world:
        schema = open_dataset(data, experiment.data_hash())
        if world.rank == 0:
            run_folder.claim(run, experiment, data=data)
        barrier()
        if run_folder.is_finished(run):
            return
        mine = Slice(world.rank, world.size, settings.batch_size)
        splits = {name: Split(data / name, schema) for name in ("train", "valid", "test")}
        trainer = Trainer(experiment, schema, world=world)
        progress = _resume(run, trainer, world=world, seed=experiment.seed)
        steps = settings.epochs * math.ceil(splits["train"].rows / mine.step_rows)
        with display(steps, is_shown=world.rank == 0) as show:
            journal = _Journal(run, show, world=world, progress=progress)
            for batch, progress in _steps(splits["train"], mine, progress=progress, settings=settings):
                journal.add(trainer.step(batch, number=progress.step))
                if progress.step % settings.log_every_steps == 0:
                    journal.write(progress)
        ...
