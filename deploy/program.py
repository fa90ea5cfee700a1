"""The served network: the trained head on merged tables, as code without weights and weights without code."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from recsys.layout import Layout
from recsys.models.head import Head


class Lookup(nn.Module):
    """Several tables as one matrix [R, W]: one memory access for all slots instead of one for each.

    `positions` are the slots' columns of `ids_BS`. An id out of its table's range would read a neighbour's row, so
    whoever calls checks the ids before; an empty slot, -1, reads row 0 of its table, and is multiplied by 0 later.
    """

    matrix_RW: Tensor
    positions_L: Tensor
    offsets_L: Tensor

    def __init__(self, positions: Sequence[int], *, names: Sequence[str], tables: Mapping[str, Tensor]) -> None:
        super().__init__()
        distinct = list(dict.fromkeys(names))
        starts: dict[str, int] = {}
        rows = 0
        for name in distinct:
            starts[name] = rows
            rows += len(tables[name])
        self.register_buffer("matrix_RW", torch.cat([tables[name] for name in distinct]))
        self.register_buffer("positions_L", torch.tensor(positions))
        self.register_buffer("offsets_L", torch.tensor([starts[name] for name in names]))

    def forward(self, ids_BS: Tensor) -> Tensor:
        """[B, S] -> [B, L, W]."""
        rows_BL = ids_BS.index_select(1, self.positions_L).clamp(min=0) + self.offsets_L
        return nn.functional.embedding(rows_BL, self.matrix_RW)


class ServedNetwork(nn.Module):
    """`forward(ids_BS, floats_BN) -> probability_BT`: merged lookups, and the head and layout that were trained."""

    def __init__(self, head: Head, layout: Layout, *, rows: Lookup | None, weights: Lookup | None) -> None:
        super().__init__()
        self.head, self.layout, self.rows, self.weights = head, layout, rows, weights

    def forward(self, ids_BS: Tensor, floats_BN: Tensor) -> Tensor:
        size = floats_BN.shape[0]
        rows_BSW = self.rows(ids_BS) if self.rows else floats_BN.new_empty((size, 0, self.layout.sizes.dim + 1))
        weights_BS = self.weights(ids_BS).squeeze(2) if self.weights else floats_BN.new_empty((size, 0))
        inputs = self.layout.inputs(rows_BSW, weights_BS, ids_BS=ids_BS, floats_BN=floats_BN)
        logits_BT: Tensor = self.head(inputs)
        return logits_BT.sigmoid()


class _Code(nn.Module):
    """The network as a function of its weights: a tuple hides it from registration, so none is exported."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self._network, self._names = (network,), tuple(names)

    def forward(self, weights: list[Tensor], ids_BS: Tensor, floats_BN: Tensor) -> Tensor:
        named = dict(zip(self._names, weights, strict=True))
        probability_BT: Tensor = functional_call(self._network[0], named, (ids_BS, floats_BN))
        return probability_BT


def save_program(network: ServedNetwork, folder: Path, *, max_rows: int, slots: int, floats: int) -> None:
    """Writes `program.pt2`, for 1 to `max_rows` rows, and `weights.safetensors`, whose sorted names are its inputs."""
    network.eval().requires_grad_(False)
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    weights = {name: tensors[name].contiguous() for name in sorted(tensors)}
    save_file(weights, folder / "weights.safetensors")
    (folder / "weights.safetensors").chmod(0o644)  # safetensors keeps it to this user; the server may be another
    program = export_code(network, weights, max_rows=max_rows, slots=slots, floats=floats)
    torch.export.save(program, folder / "program.pt2")


def export_code(
    network: ServedNetwork, weights: Mapping[str, Tensor], *, max_rows: int, slots: int, floats: int
) -> torch.export.ExportedProgram:
    """The program of (weights, ids [B, S], floats [B, N]) with no tensor inside."""
    rows = min(2, max_rows)
    ids_BS, floats_BN = torch.zeros(rows, slots, dtype=torch.int64), torch.zeros(rows, floats)
    batch = {0: torch.export.Dim("B", min=1, max=max_rows)} if max_rows > 1 else None
    with torch.no_grad():
        program = torch.export.export(
            _Code(network, list(weights)),
            (list(weights.values()), ids_BS, floats_BN),
            dynamic_shapes=([None] * len(weights), batch, batch),
        )
    if program.state_dict or program.constants:
        inside = ", ".join([*program.state_dict, *program.constants])
        raise RuntimeError(f"the program holds tensors ({inside}), wanted code alone: make them buffers of the head")
    program.example_inputs = None
    return program
