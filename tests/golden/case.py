"""What a golden vector is compared with: a head of ours fed by leaf tables, in the vector's own precision."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from etl.schema import DenseFeature, IdFeature, Schema, Table, TaskColumn
from recsys.layout import LANE, Layout
from recsys.models.head import Head, Inputs, ModelConfig
from recsys.models.layers import Dropout

Arrays = Mapping[str, npt.NDArray[Any]]
FOLDER = Path(__file__).parent


def load(name: str) -> Arrays:
    """Arrays of one golden file."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


@dataclass
class Case:
    """`parameters` are named as in the file's `grad/` and `w/` and are the leaves that `loss()` depends on."""

    head: Head
    parameters: dict[str, Tensor]
    logits: Callable[[], Tensor]
    loss: Callable[[], Tensor]


def leaf(array: npt.NDArray[Any]) -> Tensor:
    """A float64 leaf tensor."""
    return torch.tensor(array, dtype=torch.float64, requires_grad=True)


def bce(logits: Tensor, labels: npt.NDArray[Any]) -> Tensor:
    """Mean logloss."""
    return binary_cross_entropy_with_logits(logits, torch.tensor(labels, dtype=logits.dtype))


def padded(lengths_B: npt.NDArray[Any], values: npt.NDArray[Any], *, fill: float) -> npt.NDArray[Any]:
    """Jagged values of one field -> [B, longest], filled at the end."""
    longest = max(1, int(lengths_B.max()))
    out = np.full((len(lengths_B), longest), fill, values.dtype)
    out[np.arange(longest) < lengths_B[:, None]] = values
    return out


@dataclass(frozen=True)
class Field:
    """One feature of a case: ids [B, L] with -1 where there is none, values [B, L] or None, and its table's name."""

    name: str
    table: str
    ids: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64] | None = None
    type: str = "bag"
    combiner: str = "sum"
    linear_only: bool = False


def inputs(
    config: ModelConfig,
    fields: list[Field],
    *,
    vectors: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    dense: npt.NDArray[Any],
    tasks: int = 1,
) -> tuple[Layout, Inputs]:
    """Looks the fields up by plain indexing and pools them with the layout that training and serving use.

    `vectors[table]` is [R, K], `weights[table]` [R]; tables that lack one of them read zeros. `dense` is [B, N].
    """
    dim = next(iter(vectors.values())).shape[1] if vectors else LANE
    features = tuple(
        IdFeature(
            name=f.name,
            type=f.type,  # type: ignore[arg-type]
            table=f.table,
            linear_only=f.linear_only,
            slots=f.ids.shape[1],
            weighted=f.values is not None,
            combiner=f.combiner,  # type: ignore[arg-type]
        )
        for f in fields
    )
    schema = Schema(
        features=features,
        dense=tuple(DenseFeature(name=f"x{at}") for at in range(dense.shape[1])),
        tables=tuple(Table(name=name, rows=1) for name in {f.table for f in fields}),
        tasks=tuple(TaskColumn(name=f"t{at}", positive_rate=0.5) for at in range(tasks)),
    )
    layout = Layout.of(schema, config, dim=dim)
    ids_BS = torch.from_numpy(np.concatenate([f.ids for f in fields], axis=1))
    values = [f.values for f in fields if f.values is not None]
    floats_BN = torch.from_numpy(np.concatenate([dense, *values], axis=1)).double()
    rows = []
    for at, (_, table) in enumerate(layout.slots):
        ids_B = ids_BS[:, layout.columns[at]]
        vector = vectors[table] if table in vectors else torch.zeros(int(ids_B.max()) + 1, dim, dtype=torch.float64)
        weight = weights[table] if table in weights else torch.zeros(len(vector), dtype=torch.float64)
        row = torch.cat([vector, weight.reshape(-1, 1)], dim=1)[ids_B.clamp(min=0)]
        rows.append(torch.where(ids_B[:, None] >= 0, row, 0))
    rows_BSW = torch.stack(rows, dim=1)
    full = layout.vectors
    return layout, layout.inputs(rows_BSW[:, :full], rows_BSW[:, full:, dim], ids_BS=ids_BS, floats_BN=floats_BN)


def check(case: Case, z: Arrays, *, atol: float = 1e-6, logit: str = "out/logit") -> None:
    """Logits, loss and every gradient of the file."""
    case.head.eval()
    torch.testing.assert_close(case.logits(), torch.tensor(z[logit]).double(), rtol=atol, atol=atol)
    loss = case.loss()
    torch.testing.assert_close(loss, torch.tensor(z["out/loss"]).double(), rtol=atol, atol=atol)
    loss.backward()
    names = [key.removeprefix("grad/") for key in z if key.startswith("grad/")]
    if not names:
        raise AssertionError("the file holds no gradients")
    for name in names:
        grad = case.parameters[name].grad
        got = torch.zeros_like(case.parameters[name]) if grad is None else grad
        wanted = torch.tensor(z[f"grad/{name}"]).double().reshape(got.shape)
        torch.testing.assert_close(got, wanted, rtol=atol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


class _Mask(nn.Module):
    """A dropout layer whose mask of zeros and ones is known."""

    def __init__(self, mask: npt.NDArray[Any], keep_prob: float) -> None:
        super().__init__()
        self.mask = torch.tensor(mask, dtype=torch.float64) / keep_prob

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


def set_masks(head: nn.Module, masks: list[npt.NDArray[Any]]) -> None:
    """Replaces the dropout layers, in their order, by known masks of zeros and ones, with their keep probability."""
    found = [
        (module, name)
        for module in head.modules()
        for name, child in module.named_children()
        if isinstance(child, Dropout)
    ]
    for (module, name), mask in zip(found, masks, strict=True):
        setattr(module, name, _Mask(mask, getattr(module, name).keep_prob))


def fill_linear(layer: nn.Linear, *, weight: Tensor, bias: Tensor | None) -> None:
    """Makes the layer use the leaves (weight [in, out]) themselves, so that their gradients are the leaves' own."""
    del layer.weight
    layer.weight = weight.T  # type: ignore[assignment]
    if bias is not None:
        del layer.bias
        layer.bias = bias  # type: ignore[assignment]
