"""Loads a bundle's program with its weights. Copied into the bundle, so it imports nothing of ours."""

import json
import logging
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch.export.passes import move_to_device_pass

Forward = Callable[..., torch.Tensor]
Run = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]


class Files(NamedTuple):
    """Where a program lies in a bundle."""

    portable: str
    native: str


FILES = {"rows": Files("program.pt2", "native.pt2"), "ranking": Files("ranking.pt2", "ranking_native.pt2")}
_log = logging.getLogger("rankforge")


def load_weights(path: Path) -> Mapping[str, torch.Tensor]:
    """Tensors that lie in the mapped file: all processes that read it share one copy in the page cache."""
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}


@dataclass(frozen=True)
class Program:
    """(ids [B, S], floats [B, N]) -> probabilities [B, T].

    `ranked`, where the bundle ranks, takes (ids, floats) of candidates [B, .] without their users' columns, then those
    of users [U, .], and each candidate's user [B].
    """

    rows: Forward
    ranked: Forward | None

    def __call__(self, ids_BS: torch.Tensor, floats_BN: torch.Tensor) -> torch.Tensor:
        return self.rows(ids_BS, floats_BN)


def load_program(folder: Path, *, native: bool = True, device: str = "cpu") -> Program:
    """The program with its weights bound, inputs and results on the CPU.

    Native code where the bundle has it and this machine and torch can run it, else, with a log line, torch's own
    kernels one after another. Another device gets a copy of the weights and each batch, and runs torch's kernels: the
    native code is the CPU's.

    Raises:
        ValueError: an archive holds more than code; from the program, inputs of another width or type. Native code
            checks neither, and would read beyond them.
    """
    weights = [tensor.to(device) for tensor in load_weights(folder / "weights.safetensors").values()]
    told = json.loads((folder / "program.json").read_text(encoding="utf-8"))
    compiled = told["native"] if native and device == "cpu" else None
    forwards: dict[str, Forward] = {}
    for kind, widths in told["widths"].items():
        files = FILES[kind]
        run = _native(folder / files.native, compiled) or _eager(folder / files.portable, device)
        forwards[kind] = _bound(run, weights, widths=widths, device=device)
    return Program(forwards["rows"], forwards.get("ranking"))


def _bound(run: Run, weights: Sequence[torch.Tensor], *, widths: Sequence[tuple[int, int]], device: str) -> Forward:
    """Takes ids and floats of these widths, and with those of users each candidate's user."""
    wanted: list[tuple[object, ...]] = [
        column for ids, floats in widths for column in ((ids, torch.int64), (floats, torch.float32))
    ]
    wanted += [(torch.int64,)] if len(widths) > 1 else []

    def forward(*inputs: torch.Tensor) -> torch.Tensor:
        got, sizes = [(*tensor.shape[1:], tensor.dtype) for tensor in inputs], [len(tensor) for tensor in inputs]
        if got != wanted or not sizes[0] == sizes[1] == sizes[-1] or len(set(sizes[2:4])) > 1:
            raise ValueError(f"{got} for {sizes} rows, wanted {wanted} and as many rows")
        (score_BT,) = run([*weights, *(tensor.contiguous().to(device) for tensor in inputs)])
        return torch.as_tensor(score_BT).cpu()

    return forward


def cpu_flags() -> frozenset[str]:
    """What this CPU can do, in Linux's words without underscores; empty where Linux does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    return frozenset(flags.replace("_", "").split())


def _native(path: Path, told: Mapping[str, Sequence[str]] | None) -> Run | None:
    """The compiled program. An instruction that the CPU lacks would kill the process, so its needs are compared."""
    if told is None:
        return None
    torch_version, needs = torch.__version__, set(told["needs"])
    if told["torch"] != torch_version:
        reason = f"it was compiled for torch {told['torch']}, this is {torch_version}"
    elif missing := needs - cpu_flags():
        reason = f"it was compiled for {told['isa']}, this CPU lacks {', '.join(sorted(missing))}"
    else:
        try:
            loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)
        except RuntimeError as error:
            reason = f"it does not load: {error}"
        else:
            return loader.boxed_run
    _log.warning("%s: native code is not used, slower scoring instead: %s", path, reason)
    return None


def _eager(path: Path, device: str) -> Run:
    """The graph is called as it is: the wrapper that torch.export puts around it costs five times the small network."""
    _refuse_pickles(path)
    program = torch.export.load(path)
    graph = (program if device == "cpu" else move_to_device_pass(program, device)).graph_module
    graph.recompile()  # the pass changes nodes alone
    return lambda inputs: tuple(graph(*inputs))


def _refuse_pickles(program: Path) -> None:
    """torch.export.load unpickles weights and constants that an archive holds; ours holds code alone."""
    with zipfile.ZipFile(program) as archive:
        data = [entry for entry in archive.infolist() if "/data/" in entry.filename and entry.file_size]
    if foreign := [entry.filename for entry in data if not entry.filename.endswith("_config.json")]:
        raise ValueError(f"{program} holds {', '.join(foreign)}, wanted code alone")
