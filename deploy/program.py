"""The served network: the trained head on merged tables, as code without weights and weights without code."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from recsys.models.head import Head, Inputs


class Lookup(nn.Module):
    """Several features' tables as one matrix [R, W]: one memory access for all features instead of one for each.

    `positions` are the features' columns of `ids_BF`. An id out of its table's range would read a neighbour's row, so
    whoever calls checks the ids before.
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

    def forward(self, ids_BF: Tensor) -> Tensor:
        """[B, F] -> [B, L, W]."""
        return nn.functional.embedding(ids_BF.index_select(1, self.positions_L) + self.offsets_L, self.matrix_RW)


class ServedNetwork(nn.Module):
    """`forward(ids_BF, dense_BN) -> probability_BT`; a lookup that the head does not ask for is None."""

    def __init__(self, head: Head, *, vectors: Lookup | None, weights: Lookup | None, dim: int) -> None:
        super().__init__()
        self.head, self.vectors, self.weights, self.dim = head, vectors, weights, dim

    def forward(self, ids_BF: Tensor, dense_BN: Tensor) -> Tensor:
        rows = dense_BN.shape[0]
        emb_BFK = self.vectors(ids_BF) if self.vectors else dense_BN.new_empty((rows, 0, self.dim))
        linear_BL = self.weights(ids_BF).squeeze(2) if self.weights else dense_BN.new_empty((rows, 0))
        logits_BT: Tensor = self.head(Inputs(emb_BFK, linear_BL, dense_BN))
        return logits_BT.sigmoid()


class _Code(nn.Module):
    """The network as a function of its weights: a tuple hides it from registration, so none is exported."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self._network, self._names = (network,), tuple(names)

    def forward(self, weights: list[Tensor], ids_BF: Tensor, dense_BN: Tensor) -> Tensor:
        named = dict(zip(self._names, weights, strict=True))
        probability_BT: Tensor = functional_call(self._network[0], named, (ids_BF, dense_BN))
        return probability_BT


def save_program(network: ServedNetwork, folder: Path, *, max_rows: int, features: int, dense: int) -> None:
    """Writes `program.pt2`, for 1 to `max_rows` rows, and `weights.safetensors`, whose sorted names are its inputs."""
    network.eval().requires_grad_(False)
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    weights = {name: tensors[name].contiguous() for name in sorted(tensors)}
    save_file(weights, folder / "weights.safetensors")
    (folder / "weights.safetensors").chmod(0o644)  # safetensors keeps it to this user; the server may be another
    program = export_code(network, weights, max_rows=max_rows, features=features, dense=dense)
    torch.export.save(program, folder / "program.pt2")


def export_code(
    network: ServedNetwork, weights: Mapping[str, Tensor], *, max_rows: int, features: int, dense: int
) -> torch.export.ExportedProgram:
    """The program of (weights, ids [B, F], dense [B, N]) with no tensor inside."""
    rows = min(2, max_rows)
    ids_BF, dense_BN = torch.zeros(rows, features, dtype=torch.int64), torch.zeros(rows, dense)
    batch = {0: torch.export.Dim("B", min=1, max=max_rows)} if max_rows > 1 else None
    with torch.no_grad():
        program = torch.export.export(
            _Code(network, list(weights)),
            (list(weights.values()), ids_BF, dense_BN),
            dynamic_shapes=([None] * len(weights), batch, batch),
        )
    if program.state_dict or program.constants:
        inside = ", ".join([*program.state_dict, *program.constants])
        raise RuntimeError(f"the program holds tensors ({inside}), wanted code alone: make them buffers of the head")
    program.example_inputs = None
    return program
