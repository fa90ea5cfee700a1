"""The served network: the trained head on merged tables, as code without weights and weights without code."""

import copy
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from deploy.lookup import Matrices, Matrix, Reader, Split, Tables, User
from deploy.native import compile_program
from deploy.served_program import FILES
from etl.artifact import write_json
from recsys.layout import Layout
from recsys.models.head import Head
from recsys.network import Network

Dense = Literal["fp32", "bf16"]


class Precision(NamedTuple):
    """How tables are stored, and in what the wide linear layers are computed, but for those that `keep` float32."""

    tables: Tables = "fp32"
    dense: Dense = "fp32"
    keep: tuple[str, ...] = ()

    def __str__(self) -> str:
        but = f" but for {', '.join(self.keep)}" if self.keep else ""
        return f"tables {self.tables}, dense {self.dense}{but}"


FULL = Precision()


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
    """`forward(ids_BS, floats_BN) -> probability_BT`: merged tables, and the head that was trained.

    With a user the ids and floats are those of N candidates without the columns of their users.
    """

    def __init__(self, head: Head, reader: Reader) -> None:
        super().__init__()
        self.head, self.reader = head, reader
        self.eval().requires_grad_(False)

    def forward(self, ids_BS: Tensor, floats_BN: Tensor, user: User | None = None) -> Tensor:
        return self.logits_BT(ids_BS, floats_BN, user=user).sigmoid()

    def logits_BT(self, ids_BS: Tensor, floats_BN: Tensor, *, user: User | None = None) -> Tensor:
        """What the probabilities are made from."""
        logits_BT: Tensor = self.head(self.reader(ids_BS, floats_BN, user))
        return logits_BT

    def weights_by_name(self) -> dict[str, Tensor]:
        """Every tensor of the network, by sorted name."""
        tensors = dict(self.named_parameters()) | dict(self.named_buffers())
        return {name: tensors[name].contiguous() for name in sorted(tensors)}


def served_network(network: Network, precision: Precision = FULL, *, split: Split | None = None) -> ServedNetwork:
    """The trained head on merged tables: rows with a vector in one matrix, first-order weights alone in another."""
    layout = network.layout
    tables: dict[str, Tensor] = {
        config.name: network.tables.embedding_bags[config.name].weight.detach()
        for config in network.tables.embedding_bag_configs()
    }
    names = [table for _, table in layout.slots]
    dim = layout.sizes.dim
    used = dim + (1 if layout.linear else 0)  # the rest is padding
    rows = {name: _filled_up(tables[name], layout, table=name)[:, :used] for name in names[: layout.vectors]}
    weights = {name: tables[name][:, :1] for name in names[layout.vectors :]}
    stored = precision.tables
    matrices = Matrices(
        Matrix(rows, vector=dim, precision=stored) if rows else None,
        Matrix(weights, precision=stored) if weights else None,
    )
    served = ServedNetwork(network.head, Reader(layout, matrices, split=split))
    return served if precision.dense == "fp32" else with_bf16(served, keep=precision.keep)


def _filled_up(rows_RW: Tensor, layout: Layout, *, table: str) -> Tensor:
    """Rows whose vector is as long as the model's, by zeros."""
    if (dim := layout.dims.get(table)) is None:
        return rows_RW
    zeros_RK = rows_RW.new_zeros(len(rows_RW), layout.sizes.dim - dim)
    return torch.cat([rows_RW[:, :dim], zeros_RK, rows_RW[:, dim:]], dim=1)


def with_bf16(served: ServedNetwork, *, keep: Collection[str]) -> ServedNetwork:
    """The same lookups, and a copy of the head whose wide layers compute in bfloat16, but for those to keep."""
    head = copy.deepcopy(served.head)
    for name, linear in wide_layers(head).items():
        if name not in keep:
            head.set_submodule(name, Bf16Linear(linear))
    return ServedNetwork(head, served.reader)


def wide_layers(head: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that bfloat16 is for, by name; narrow ones, such as the last, cost little and stay float32."""
    linears = {name: module for name, module in head.named_modules() if isinstance(module, nn.Linear)}
    return {name: linear for name, linear in linears.items() if linear.out_features >= 16}


class _Code(nn.Module):
    """The network as a function of its weights: a tuple hides it from registration, so none is exported."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self._network, self._names = (network,), tuple(names)

    def forward(self, weights: list[Tensor], ids_BS: Tensor, floats_BN: Tensor, user: tuple[Tensor, ...]) -> Tensor:
        named = dict(zip(self._names, weights, strict=True))
        inputs = (ids_BS, floats_BN, User(*user) if user else None)
        probability_BT: Tensor = functional_call(self._network[0], named, inputs)
        return probability_BT


class Shape(NamedTuple):
    """What the program takes: 1 to `max_rows` rows of `slots` ids and `floats` numbers."""

    max_rows: int
    slots: int
    floats: int


def save_program(network: ServedNetwork, folder: Path, *, shape: Shape, level: str | None) -> None:
    """Writes the weights, the programs whose first inputs they are, by sorted name, and what loads them must know.

    The second program is of candidates and their users, where the network knows which columns are a user's. With a
    `level` of x86-64, native code too.
    """
    weights, needs = network.weights_by_name(), set[str]()
    save_file(weights, folder / "weights.safetensors")
    (folder / "weights.safetensors").chmod(0o644)  # safetensors keeps it to this user; the server may be another
    widths = {"rows": [(shape.slots, shape.floats)]}
    if network.reader.split:
        user, candidates = ((len(columns.ids), len(columns.floats)) for columns in network.reader.split)
        widths["ranking"] = [candidates, user]
    for kind, sides in widths.items():
        program = export_code(network, weights, sides=sides, max_rows=shape.max_rows)
        if level:
            needs |= set(compile_program(program, folder / FILES[kind].native, level=level))
        program.example_inputs = None  # the weights
        torch.export.save(program, folder / FILES[kind].portable)
    native = {"isa": level, "needs": sorted(needs), "torch": torch.__version__} if level else None
    write_json(folder / "program.json", {"widths": widths, "native": native})


def export_code(
    network: ServedNetwork, weights: Mapping[str, Tensor], *, sides: Sequence[tuple[int, int]], max_rows: int
) -> torch.export.ExportedProgram:
    """The program of (weights, ids [B, S], floats [B, N], user) with no tensor inside but its example inputs.

    `sides` are the widths of ids and floats: of rows, or of candidates and of users.
    """
    size = min(2, max_rows)
    batch, users = ({0: torch.export.Dim(name, min=1, max=max_rows)} if max_rows > 1 else None for name in "BU")
    examples = [(torch.zeros(size, slots, dtype=torch.int64), torch.zeros(size, floats)) for slots, floats in sides]
    user = (*examples[1], torch.zeros(size, dtype=torch.int64)) if len(sides) > 1 else ()
    with torch.no_grad():
        program = torch.export.export(
            _Code(network, list(weights)),
            (list(weights.values()), *examples[0], user),
            dynamic_shapes=([None] * len(weights), batch, batch, (users, users, batch)[: len(user)]),
        )
    program.graph.eliminate_dead_code()  # what this head does not read
    if program.state_dict or program.constants:
        inside = ", ".join([*program.state_dict, *program.constants])
        raise RuntimeError(f"the program holds tensors ({inside}), wanted code alone: make them buffers of the head")
    return program
