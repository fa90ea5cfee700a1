"""Saves and loads tensors with torch.distributed.checkpoint; what was saved by some ranks loads on any number."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state
from torch.optim import Optimizer
from torchrec.distributed import DistributedModelParallel


def save(folder: Path, model: DistributedModelParallel, *, optimizer: Optimizer) -> None:
    """Every rank writes its shards of weights and optimizer states into one folder."""
    save_state(_state(model, optimizer), checkpoint_id=folder)


def restore(folder: Path, model: DistributedModelParallel, *, optimizer: Optimizer) -> None:
    """Loads what `save` wrote into the model and the optimizers, in place, whatever the sharding was."""
    load_state(_state(model, optimizer), checkpoint_id=folder)


def restore_unsharded(folder: Path, network: nn.Module) -> None:
    """Loads the weights into a plain network of one process, without a process group."""
    load_state({"model": network.state_dict()}, checkpoint_id=folder, no_dist=True)


def prime(optimizer: Optimizer) -> None:
    """Creates the optimizer's states, which torch leaves to the first step, so that they can be loaded into."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


def _state(model: DistributedModelParallel, optimizer: Optimizer) -> dict[str, Any]:
    """Tensors alone: a checkpoint then needs no unpickling but of its index."""
    dense: Mapping[int, Mapping[str, Tensor]] = optimizer.state_dict()["state"]
    return {
        "model": model.state_dict(),
        "tables": model.fused_optimizer.state_dict()["state"],
        "dense": {str(at): dict(state) for at, state in dense.items()},
    }


def restore_tables_and_head(folder: Path, model: DistributedModelParallel) -> None:
    """Loads the weights alone, into however many ranks there are."""
    load_state({"model": model.state_dict()}, checkpoint_id=folder)
