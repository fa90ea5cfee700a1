"""What a rank's memory holds beside tables: head, activations, batches, the libraries themselves."""

from dataclasses import dataclass

import torch
from torch import Tensor

from etl.schema import Schema
from recsys.ahead import AHEAD
from recsys.data import WINDOW_BYTES
from recsys.experiment import Experiment
from recsys.layout import LANE
from recsys.network import Network
from recsys.optim import state_count

GIB = 1 << 30
# Measured on the CPU build: interpreter, torch, torchrec, FBGEMM and pyarrow, and gloo's buffers.
_CPU_PROCESS = int(0.42 * GIB)
# Of CUDA these are allowances, not measurements: context and kernels, NCCL's buffers; the process on the host.
_CUDA_CONTEXT = 2 * GIB
_CUDA_PROCESS = 4 * GIB


@dataclass(frozen=True)
class Dense:
    """Bytes of one rank: the head's weights, gradients and states, activations, batches on device and on host."""

    weights: int
    gradients: int
    states: int
    activations: int
    batch: int
    reading: int

    def reserved(self, device: str) -> int:
        """What the planner has to leave free of the memory that the rank computes in."""
        return sum(self.device(device).values())

    def device(self, device: str) -> dict[str, int]:
        """In the memory that the rank computes in."""
        return {
            "head": self.weights + self.gradients + self.states,
            "activations": self.activations,
            "batches": 2 * self.batch,
            "libraries": _CPU_PROCESS if device == "cpu" else _CUDA_CONTEXT,
        }

    def host(self, device: str) -> dict[str, int]:
        """In host memory."""
        return {"reading": self.reading} | ({} if device == "cpu" else {"libraries": _CUDA_PROCESS})


def dense_bytes(experiment: Experiment, network: Network, *, schema: Schema) -> Dense:
    """Counted from the head itself: a forward pass of few rows shows what is kept for the backward pass."""
    parameters = sum(parameter.numel() for parameter in network.head.parameters())
    rows, batch_size, rank_rows = experiment.etl.rows_per_group, experiment.train.batch_size, experiment.train.rank_rows
    row_bytes = len(schema.slot_names) * 8 + len(schema.float_names) * 4 + len(schema.tasks) * 8 + 4
    few, more = (_kept_bytes(network, schema, rows=size, precision=experiment.train.precision) for size in (8, 16))
    slope = (more - few) / 8
    return Dense(
        weights=parameters * 4,
        gradients=parameters * 4,
        states=parameters * 4 * state_count(experiment.train),
        activations=int(few + slope * (batch_size - 8)),
        batch=rank_rows * row_bytes,
        reading=(AHEAD * rank_rows + 2 * rows) * row_bytes + max(WINDOW_BYTES, rows * row_bytes),
    )


def _kept_bytes(network: Network, schema: Schema, *, rows: int, precision: str) -> int:
    """Bytes that autograd keeps between the passes of the head, parameters left out, and as many gradients once."""
    layout = network.layout
    full, single = layout.vectors * layout.width, (len(layout.slots) - layout.vectors) * LANE
    rows_BD = torch.rand(rows, full + single, requires_grad=True)
    ids_BS = torch.zeros(rows, len(schema.slot_names), dtype=torch.int64)
    floats_BN = torch.rand(rows, len(schema.float_names))
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.head.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    bf16 = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), bf16:
        rows_BSW = rows_BD[:, :full].view(rows, layout.vectors, layout.width)
        inputs = layout.inputs(rows_BSW, rows_BD[:, full::LANE], ids_BS=ids_BS, floats_BN=floats_BN)
        logits = network.head.train()(inputs)
    kept[logits.data_ptr()] = logits.nbytes
    return sum(kept.values())
