"""Loads a bundle's program with its weights. Copied into the bundle, so it imports nothing of ours."""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def load_weights(path: Path) -> Mapping[str, torch.Tensor]:
    """Tensors that lie in the mapped file: all processes that read it share one copy in the page cache."""
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}


def load_program(folder: Path) -> Forward:
    """The program with its weights bound: (ids [B, S], floats [B, N]) -> probabilities [B, T].

    The graph is called as it is: the wrapper that torch.export puts around it costs five times the small network.
    """
    weights = load_weights(folder / "weights.safetensors").values()
    _refuse_pickles(folder / "program.pt2")
    graph = torch.export.load(folder / "program.pt2").graph_module

    def forward(ids_BS: torch.Tensor, floats_BN: torch.Tensor) -> torch.Tensor:
        (score_BT,) = graph(*weights, ids_BS, floats_BN)
        return torch.as_tensor(score_BT)

    return forward


def _refuse_pickles(program: Path) -> None:
    """torch.export.load unpickles weights and constants that an archive holds; ours holds code alone."""
    with zipfile.ZipFile(program) as archive:
        data = [entry for entry in archive.infolist() if "/data/" in entry.filename and entry.file_size]
    if foreign := [entry.filename for entry in data if not entry.filename.endswith("_config.json")]:
        raise ValueError(f"{program} holds {', '.join(foreign)}, wanted code alone")
