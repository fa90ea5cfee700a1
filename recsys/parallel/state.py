"""Saves and loads tensors with torch.distributed.checkpoint; what was saved by some ranks loads on any number."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state
from torch.optim import Optimizer
from torchrec.distributed.types import Shard, ShardedTensor

from recsys.parallel.rows import RowOptimizer
from recsys.parallel.shard import Sharded


def save(folder: Path, sharded: Sharded, *, optimizer: Optimizer) -> None:
    """Every rank writes its shards of weights and optimizer states into one folder."""
    save_state(_state(sharded, optimizer), checkpoint_id=folder)


def restore(folder: Path, sharded: Sharded, *, optimizer: Optimizer) -> None:
    """Loads what `save` wrote into the model and the optimizers, in place, whatever the sharding was."""
    load_state(_state(sharded, optimizer), checkpoint_id=folder)


def restore_unsharded(folder: Path, network: nn.Module) -> None:
    """Loads the weights into a plain network of one process, without a process group."""
    load_state({"model": network.state_dict()}, checkpoint_id=folder, no_dist=True)


def restore_weights(folder: Path, sharded: Sharded) -> None:
    """Loads the weights alone, into however many ranks there are."""
    load_state({"model": sharded.model.state_dict()}, checkpoint_id=folder)


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
