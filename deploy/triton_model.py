"""The model as Triton's Python backend runs it: `model.py` of the repository, beside the bundle's other files."""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils

_WARM_UP_ROWS = (1, 2, 8, 64)


class TritonPythonModel:
    """Called by the stub, one object an instance."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Refuses to serve where this numpy and this stub do not understand each other."""
        torch.set_num_threads(1)
        _check_arrays()
        folder = Path(__file__).parent
        self._beside = _load(folder, "ranker")
        program = _load(folder, "served_program").load_program(folder)
        self._ranker = self._beside.Ranker(folder, _load(folder, "transform"), program=program)
        for rows in _WARM_UP_ROWS * 2:
            self._ranker.score([self._ranker.blank(rows)])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """A response for each request: its outputs, or INVALID_ARG with the fault of this request alone."""
        results = self._ranker.score([self._packed(request) for request in requests])
        return [_response(request, result) for request, result in zip(requests, results, strict=True)]

    def _packed(self, request: Any) -> Any:
        given = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        rows = len(next(iter(given.values())))
        blank = self._ranker.blank(rows)
        return self._beside.Request(given.get("keys", blank.keys), given.get("numbers", blank.numbers))


def _response(request: Any, result: Any) -> Any:
    if isinstance(result, ValueError):
        error = pb_utils.TritonError(str(result), pb_utils.TritonError.INVALID_ARG)
        return pb_utils.InferenceResponse(error=error)
    outputs = [pb_utils.Tensor(name, getattr(result, name)) for name in request.requested_output_names()]
    return pb_utils.InferenceResponse(outputs)


def _check_arrays() -> None:
    """The stub of Triton 2.51 hands out arrays of numpy 2 with every element equal to the first."""
    wanted = np.arange(12, dtype=np.int64).reshape(3, 4)
    got = pb_utils.Tensor.from_dlpack("check", torch.from_numpy(wanted.copy())).as_numpy()
    back = pb_utils.Tensor("check", wanted).as_numpy()
    if not (np.array_equal(got, wanted) and np.array_equal(back, wanted)):
        raise RuntimeError(f"numpy {np.__version__} and this stub corrupt arrays: install numpy<2")


def _load(folder: Path, name: str) -> ModuleType:
    """The module in the file beside this one, whatever else may carry its name."""
    spec = importlib.util.spec_from_file_location(f"rankforge_{name}", folder / f"{name}.py")
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{folder / name}.py cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module
