"""The served network: the trained head on merged tables, as code without weights and weights without code."""

import copy
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from deploy.native import compile_program
from etl.artifact import write_json
from recsys.layout import Layout
from recsys.models.head import Head
from recsys.network import Network

Tables = Literal["fp32", "fp16", "int8"]
Dense = Literal["fp32", "bf16"]


class Precision(NamedTuple):
    """How tables are stored, and in what the wide linear layers are computed, but for those that `keep` float32."""

    tables: Tables = "fp32"
    dense: Dense = "fp32"
    keep: tuple[str, ...] = ()

    def __str__(self) -> str:
        but = f" but for {', '.join(self.keep)}" if self.keep else ""
        return f"tables {self.tables}, dense {self.dense}{but}"


class Lookup(nn.Module):
    """Several tables as one matrix [R, W]: one memory access for all slots instead of one for each.

    `positions` are the slots' columns of `ids_BS`. An id out of its table's range would read a neighbour's row, so
    whoever calls checks the ids before; an empty slot, -1, reads row 0 of its table, and is multiplied by 0 later.

    int8 rows are bytes with a scale and a start of their own, [R, K + 8]; the first-order weight, which would widen the
    range of the vector beside it, stays float32, as do rows of a weight alone (`vector` is 0).
    """

    matrix_RW: Tensor
    weights_RC: Tensor | None
    positions_L: Tensor
    offsets_L: Tensor

    def __init__(
        self,
        positions: Sequence[int],
        *,
        names: Sequence[str],
        tables: Mapping[str, Tensor],
        vector: int = 0,
        precision: Tables = "fp32",
    ) -> None:
        super().__init__()
        distinct = list(dict.fromkeys(names))
        starts: dict[str, int] = {}
        rows = 0
        for name in distinct:
            starts[name] = rows
            rows += len(tables[name])
        matrix_RW, weights_RC = torch.cat([tables[name] for name in distinct]), None
        if precision == "fp16":
            matrix_RW = matrix_RW.half()
        elif precision == "int8" and vector:
            weights_RC = matrix_RW[:, vector:].contiguous() if matrix_RW.shape[1] > vector else None
            matrix_RW = torch.ops.quantized.embedding_bag_byte_prepack(matrix_RW[:, :vector].contiguous())
        self.register_buffer("matrix_RW", matrix_RW)
        self.register_buffer("weights_RC", weights_RC)
        self.register_buffer("positions_L", torch.tensor(positions))
        self.register_buffer("offsets_L", torch.tensor([starts[name] for name in names]))

    def forward(self, ids_BS: Tensor) -> Tensor:
        """[B, S] -> [B, L, W], float32."""
        rows_BL = ids_BS.index_select(1, self.positions_L).clamp(min=0) + self.offsets_L
        rows_R = rows_BL.flatten()
        if self.matrix_RW.dtype == torch.uint8:
            bags_R = torch.arange(rows_R.shape[0])
            got_RW: Tensor = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(self.matrix_RW, rows_R, bags_R)
            if self.weights_RC is not None:
                got_RW = torch.cat([got_RW, _rows(self.weights_RC, rows_R)], dim=1)
        else:
            got_RW = _rows(self.matrix_RW, rows_R).float()
        return got_RW.view(*rows_BL.shape, got_RW.shape[1])


def _rows(matrix_RW: Tensor, rows_R: Tensor) -> Tensor:
    """Rows of a matrix as bags of one: a kernel that reads ahead, and that compilers do not repeat for each reader."""
    return nn.functional.embedding_bag(rows_R, matrix_RW, torch.arange(rows_R.shape[0]), mode="sum")


class Bf16Linear(nn.Module):
    """A linear layer with weights, inputs and outputs of bfloat16, between float32 neighbours: [..., I] -> [..., O]."""

    weight_OI: Tensor
    bias_O: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight_OI", linear.weight.detach().bfloat16())
        self.register_buffer("bias_O", None if linear.bias is None else linear.bias.detach().bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.bfloat16(), self.weight_OI, self.bias_O).float()


class ServedNetwork(nn.Module):
    """`forward(ids_BS, floats_BN) -> probability_BT`: merged lookups, and the head and layout that were trained."""

    def __init__(self, head: Head, layout: Layout, *, rows: Lookup | None, weights: Lookup | None) -> None:
        super().__init__()
        self.head, self.layout, self.rows, self.weights = head, layout, rows, weights
        self.eval().requires_grad_(False)

    def forward(self, ids_BS: Tensor, floats_BN: Tensor) -> Tensor:
        return self.logits_BT(ids_BS, floats_BN).sigmoid()

    def logits_BT(self, ids_BS: Tensor, floats_BN: Tensor) -> Tensor:
        """What the probabilities are made from."""
        size = floats_BN.shape[0]
        rows_BSW = self.rows(ids_BS) if self.rows else floats_BN.new_empty((size, 0, self.layout.sizes.dim + 1))
        weights_BS = self.weights(ids_BS).squeeze(2) if self.weights else floats_BN.new_empty((size, 0))
        inputs = self.layout.inputs(rows_BSW, weights_BS, ids_BS=ids_BS, floats_BN=floats_BN)
        logits_BT: Tensor = self.head(inputs)
        return logits_BT

    def weights_by_name(self) -> dict[str, Tensor]:
        """Every tensor of the network, by sorted name."""
        tensors = dict(self.named_parameters()) | dict(self.named_buffers())
        return {name: tensors[name].contiguous() for name in sorted(tensors)}


def served_network(network: Network, precision: Precision = Precision()) -> ServedNetwork:  # noqa: B008
    """The trained head on merged tables: rows with a vector in one matrix, first-order weights alone in another."""
    layout = network.layout
    tables: dict[str, Tensor] = {
        config.name: network.tables.embedding_bags[config.name].weight.detach()
        for config in network.tables.embedding_bag_configs()
    }
    names = [table for _, table in layout.slots]
    full, alone = names[: layout.vectors], names[layout.vectors :]
    dim = layout.sizes.dim
    used = dim + (1 if layout.linear else 0)  # the rest is padding
    rows, weights = {name: tables[name][:, :used] for name in full}, {name: tables[name][:, :1] for name in alone}
    first, rest = layout.columns[: layout.vectors], layout.columns[layout.vectors :]
    stored = precision.tables
    served = ServedNetwork(
        network.head,
        layout,
        rows=Lookup(first, names=full, tables=rows, vector=dim, precision=stored) if full else None,
        weights=Lookup(rest, names=alone, tables=weights, precision=stored) if alone else None,
    )
    return served if precision.dense == "fp32" else with_bf16(served, keep=precision.keep)


def with_bf16(served: ServedNetwork, *, keep: Collection[str]) -> ServedNetwork:
    """The same lookups, and a copy of the head whose wide layers compute in bfloat16, but for those to keep."""
    head = copy.deepcopy(served.head)
    for name, linear in wide_layers(head).items():
        if name not in keep:
            head.set_submodule(name, Bf16Linear(linear))
    return ServedNetwork(head, served.layout, rows=served.rows, weights=served.weights)


def wide_layers(head: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that bfloat16 is for, by name; narrow ones, such as the last, cost little and stay float32."""
    linears = {name: module for name, module in head.named_modules() if isinstance(module, nn.Linear)}
    return {name: linear for name, linear in linears.items() if linear.out_features >= 16}


class _Code(nn.Module):
    """The network as a function of its weights: a tuple hides it from registration, so none is exported."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self._network, self._names = (network,), tuple(names)

    def forward(self, weights: list[Tensor], ids_BS: Tensor, floats_BN: Tensor) -> Tensor:
        named = dict(zip(self._names, weights, strict=True))
        probability_BT: Tensor = functional_call(self._network[0], named, (ids_BS, floats_BN))
        return probability_BT


class Shape(NamedTuple):
    """What the program takes: 1 to `max_rows` rows of `slots` ids and `floats` numbers."""

    max_rows: int
    slots: int
    floats: int


def save_program(network: ServedNetwork, folder: Path, *, shape: Shape, level: str | None) -> None:
    """Writes the weights, the program whose first inputs they are, by sorted name, and what loads it must know.

    With a `level` of x86-64, native code too.
    """
    weights = network.weights_by_name()
    save_file(weights, folder / "weights.safetensors")
    (folder / "weights.safetensors").chmod(0o644)  # safetensors keeps it to this user; the server may be another
    program = export_code(network, weights, shape=shape)
    native = None
    if level:
        needs = compile_program(program, folder / "native.pt2", level=level)
        native = {"isa": level, "needs": needs, "torch": torch.__version__}
    program.example_inputs = None  # the weights
    torch.export.save(program, folder / "program.pt2")
    write_json(folder / "program.json", {"slots": shape.slots, "floats": shape.floats, "native": native})


def export_code(network: ServedNetwork, weights: Mapping[str, Tensor], *, shape: Shape) -> torch.export.ExportedProgram:
    """The program of (weights, ids [B, S], floats [B, N]) with no tensor inside but its example inputs."""
    rows = min(2, shape.max_rows)
    ids_BS, floats_BN = torch.zeros(rows, shape.slots, dtype=torch.int64), torch.zeros(rows, shape.floats)
    batch = {0: torch.export.Dim("B", min=1, max=shape.max_rows)} if shape.max_rows > 1 else None
    with torch.no_grad():
        program = torch.export.export(
            _Code(network, list(weights)),
            (list(weights.values()), ids_BS, floats_BN),
            dynamic_shapes=([None] * len(weights), batch, batch),
        )
    if program.state_dict or program.constants:
        inside = ", ".join([*program.state_dict, *program.constants])
        raise RuntimeError(f"the program holds tensors ({inside}), wanted code alone: make them buffers of the head")
    return program
