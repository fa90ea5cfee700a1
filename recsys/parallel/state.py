"""Saves and loads tensors with torch.distributed.checkpoint; what was saved by some ranks loads on any number."""

import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state
from torch.distributed.remote_device import _remote_device
from torch.optim import Optimizer
from torchrec.distributed.types import Shard, ShardedTensor

from recsys.parallel.rows import RowOptimizer
from recsys.parallel.shard import Sharded

State = Mapping[str, Any]
"""Tensors in nested dicts."""

_PIECE_BYTES = 1 << 24
"""Of a shard that is written or read at once: torch's checkpoints hold a piece whole on its way."""


def snapshot(sharded: Sharded, *, optimizer: Optimizer) -> State:
    """This rank's share of weights and optimizer states as they are now, copied into host memory."""
    copied: State = _in_pieces(_state(sharded, optimizer), copies=True)
    return copied


def in_place(sharded: Sharded, *, optimizer: Optimizer) -> State:
    """The same share where it lies, for a write during which nothing moves."""
    own: State = _in_pieces(_state(sharded, optimizer), copies=False)
    return own


def write(folder: Path, state: State, *, group: ProcessGroup | None = None) -> None:
    """Every rank writes its share into one folder; they talk over `group`."""
    save_state(dict(state), checkpoint_id=folder, process_group=group)


def save(folder: Path, sharded: Sharded, *, optimizer: Optimizer) -> None:
    """Every rank writes its shards of weights and optimizer states into one folder."""
    write(folder, _state(sharded, optimizer))


def restore(folder: Path, sharded: Sharded, *, optimizer: Optimizer) -> None:
    """Loads what `save` wrote into the model and the optimizers, in place, whatever the sharding was."""
    load_state(_state(sharded, optimizer), checkpoint_id=folder)
    sharded.rows_were_loaded()


def restore_unsharded(folder: Path, network: nn.Module) -> None:
    """Loads the weights into a plain network of one process, without a process group."""
    load_state({"model": network.state_dict()}, checkpoint_id=folder, no_dist=True)


def restore_weights(folder: Path, sharded: Sharded) -> None:
    """Loads the weights alone, into however many ranks there are."""
    load_state({"model": sharded.model.state_dict()}, checkpoint_id=folder)
    sharded.rows_were_loaded()


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its name, whole, without a process group."""
    found = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in sorted(FileSystemReader(folder).read_metadata().state_dict_metadata.items())
        if isinstance(about, TensorStorageMetadata)
    }
    load_state(dict(found), checkpoint_id=folder, no_dist=True)
    return found


Sizes = Mapping[str, tuple[int, ...]]
"""Of whole tensors by the names that they have in a checkpoint."""


def sizes_here(sharded: Sharded, *, optimizer: Optimizer) -> Sizes:
    """What a checkpoint of this model and its optimizers would hold."""
    return {name: tuple(tensor.size()) for name, tensor in flatten_state_dict(_state(sharded, optimizer))[0].items()}


def sizes_of(folder: Path) -> Sizes:
    """What a checkpoint holds."""
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: tuple(about.size) for name, about in saved.items() if isinstance(about, TensorStorageMetadata)}


def restore_parts(folder: Path, names: Iterable[str], *, sharded: Sharded, optimizer: Optimizer) -> None:
    """Loads of these tensors, in place, what both the checkpoint and this rank have: no rank waits for another.

    What was saved with fewer rows or columns fills the first ones; the others stay as they are.
    """
    state, wanted = flatten_state_dict(_state(sharded, optimizer))[0], set(names)
    reader = FileSystemReader(folder)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    into = {name: list(_parts(value)) for name, value in state.items() if name in wanted}
    planner = _Parts(into, saved=metadata.state_dict_metadata)
    reader.read_data(planner.create_local_plan(), planner).wait()
    sharded.rows_were_loaded()


class _Parts(DefaultLoadPlanner):
    """Reads into parts of tensors, each given by the place of its first element in the whole."""

    def __init__(self, into: Mapping[str, list[tuple[list[int], Tensor]]], *, saved: Mapping[str, Any]) -> None:
        super().__init__()
        self._into, self._saved = into, saved

    def create_local_plan(self) -> LoadPlan:
        """Everything that overlaps."""
        found: list[ReadItem] = []
        for name, parts in self._into.items():
            chunks = [ChunkStorageMetadata(torch.Size(first), part.size()) for first, part in parts if part.numel()]
            found += create_read_items_for_chunk_list(name, self._saved[name], chunks)
        return LoadPlan(found)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The piece of a part that an item fills."""
        name, first = read_item.dest_index.fqn, list(read_item.dest_index.offset or [])
        piece = next(part for place, part in self._into[name] if place == first and part.numel())
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            piece = piece.narrow(dim, start, length)
        return piece


def _parts(value: Any) -> Iterator[tuple[list[int], Tensor]]:
    """What this rank holds of a tensor, each part with the place of its first element."""
    if isinstance(value, ShardedTensor):
        yield from ((list(part.metadata.shard_offsets), part.tensor.detach()) for part in value.local_shards())
    else:
        yield [0] * value.dim(), value.detach()


def _in_pieces(value: Any, *, copies: bool) -> Any:
    """The tensors, or copies of them in host memory, those of shards in pieces."""
    if isinstance(value, Mapping):
        return {name: _in_pieces(part, copies=copies) for name, part in value.items()}
    if not isinstance(value, ShardedTensor):
        return _in_host_memory(value) if copies else value
    metadata = copy.copy(value.metadata())
    item_bytes = metadata.tensor_properties.dtype.itemsize
    metadata.shards_metadata = [
        piece for place in metadata.shards_metadata for piece in _pieces(place, item_bytes, on_cpu=copies)
    ]
    shards = []
    for shard in value.local_shards():
        for piece in _pieces(shard.metadata, item_bytes, on_cpu=copies):
            first = piece.shard_offsets[0] - shard.metadata.shard_offsets[0]
            tensor = shard.tensor.detach()[first : first + piece.shard_sizes[0]]
            shards.append(Shard(_in_host_memory(tensor) if copies else _alone(tensor), piece))
    return ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata)


def _pieces(place: ShardMetadata, item_bytes: int, *, on_cpu: bool) -> Iterator[ShardMetadata]:
    """A shard cut by rows into pieces of at most `_PIECE_BYTES`, or of one row."""
    if on_cpu:
        rank = place.placement.rank()  # type: ignore[union-attr]  # torchrec always says where a shard lies
        place = dataclasses.replace(place, placement=_remote_device(f"rank:{rank}/cpu"))
    (first, *columns), (rows, *width) = place.shard_offsets, place.shard_sizes
    step = max(_PIECE_BYTES // max(item_bytes * math.prod(width), 1), 1)
    for low in range(0, max(rows, 1), step):
        sizes = [min(step, rows - low), *width]
        yield dataclasses.replace(place, shard_offsets=[first + low, *columns], shard_sizes=sizes)


def _alone(value: Tensor) -> Tensor:
    """The same memory, on CPU as a storage of its own: of a part of one torch's checkpoints write a copy, which stays
    until Python's collector finds it."""
    return torch.from_numpy(value.numpy()) if value.device.type == "cpu" else value


def _in_host_memory(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)


def _state(sharded: Sharded, optimizer: Optimizer) -> dict[str, Any]:
    """Tensors alone: a checkpoint then needs no unpickling but of its index."""
    names = {id(parameter): name for name, parameter in sharded.model.named_parameters()}
    tables = {name: dict(states) for name, states in sharded.model.fused_optimizer.state_dict()["state"].items()}
    second = _second_states(tables, sharded.rows) if sharded.rows else {}
    for table, first in sharded.replicated_states(0).items():
        tables[f"tables.embedding_bags.{table}.weight"] = {f"{table}.momentum1": first}
    second |= {f"{table}.momentum1": state for table, state in sharded.replicated_states(1).items()}
    parts: dict[str, dict[str, Any]] = {
        "model": sharded.model.state_dict(),
        "tables": tables,
        "second": second,
        "dense": {names[id(parameter)]: dict(state) for parameter, state in optimizer.state.items()},
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
