"""Saves and loads tensors with torch.distributed.checkpoint; what was saved by some ranks loads on any number."""

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state
from torch.distributed.remote_device import _remote_device
from torch.optim import Optimizer
from torchrec.distributed.types import Shard, ShardedTensor

from recsys.parallel.rows import RowOptimizer
from recsys.parallel.shard import Sharded

State = Mapping[str, Any]
"""Tensors in nested dicts."""


def snapshot(sharded: Sharded, *, optimizer: Optimizer) -> State:
    """This rank's share of weights and optimizer states as they are now, copied into host memory."""
    copied: State = _copied(_state(sharded, optimizer))
    return copied


def write(folder: Path, state: State, *, group: ProcessGroup | None = None) -> None:
    """Every rank writes its share into one folder; they talk over `group`."""
    save_state(dict(state), checkpoint_id=folder, process_group=group)


def save(folder: Path, sharded: Sharded, *, optimizer: Optimizer) -> None:
    """Every rank writes its shards of weights and optimizer states into one folder."""
    write(folder, _state(sharded, optimizer))


def restore(folder: Path, sharded: Sharded, *, optimizer: Optimizer) -> None:
    """Loads what `save` wrote into the model and the optimizers, in place, whatever the sharding was."""
    load_state(_state(sharded, optimizer), checkpoint_id=folder)


def restore_unsharded(folder: Path, network: nn.Module) -> None:
    """Loads the weights into a plain network of one process, without a process group."""
    load_state({"model": network.state_dict()}, checkpoint_id=folder, no_dist=True)


def restore_weights(folder: Path, sharded: Sharded) -> None:
    """Loads the weights alone, into however many ranks there are."""
    load_state({"model": sharded.model.state_dict()}, checkpoint_id=folder)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its name, whole, without a process group."""
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    found = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in sorted(saved.items())
        if isinstance(about, TensorStorageMetadata)
    }
    load_state(dict(found), checkpoint_id=folder, no_dist=True)
    return found


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _copied(part) for name, part in value.items()}
    if isinstance(value, ShardedTensor):
        metadata = copy.copy(value.metadata())
        metadata.shards_metadata = [_on_cpu(place) for place in metadata.shards_metadata]
        shards = [Shard(_in_host_memory(shard.tensor), _on_cpu(shard.metadata)) for shard in value.local_shards()]
        return ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata)
    return _in_host_memory(value)


def _on_cpu(place: ShardMetadata) -> ShardMetadata:
    rank = place.placement.rank()  # type: ignore[union-attr]  # torchrec always says where a shard lies
    return dataclasses.replace(place, placement=_remote_device(f"rank:{rank}/cpu"))


def _in_host_memory(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)


def _state(sharded: Sharded, optimizer: Optimizer) -> dict[str, Any]:
    """Tensors alone: a checkpoint then needs no unpickling but of its index."""
    dense: Mapping[int, Mapping[str, Tensor]] = optimizer.state_dict()["state"]
    tables = {name: dict(states) for name, states in sharded.model.fused_optimizer.state_dict()["state"].items()}
    second = _second_states(tables, sharded.rows) if sharded.rows else {}
    for table, first in sharded.replicated_states(0).items():
        tables[f"tables.embedding_bags.{table}.weight"] = {f"{table}.momentum1": first}
    second |= {f"{table}.momentum1": state for table, state in sharded.replicated_states(1).items()}
    parts: dict[str, dict[str, Any]] = {
        "model": sharded.model.state_dict(),
        "tables": tables,
        "second": second,
        "dense": {str(at): dict(state) for at, state in dense.items()},
    }
    return {name: part for name, part in parts.items() if part}  # an empty one, of a rank without tables, is a key too


def _second_states(tables: Mapping[str, Mapping[str, Any]], rows: RowOptimizer) -> dict[str, Any]:
    """The states that FBGEMM has no place for, sharded as those that it has: found by the memory they lie beside."""
    second: dict[str, Any] = {}
    for states in tables.values():
        for name, first in states.items():
            if isinstance(first, ShardedTensor) and all(group.second_RW is not None for group in rows.groups):
                shards = [Shard(rows.second_beside(shard.tensor), shard.metadata) for shard in first.local_shards()]
                second[name] = ShardedTensor._init_from_local_shards_and_global_metadata(shards, first.metadata())
    return second
