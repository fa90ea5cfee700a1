"""The model file itself, with a stand-in for the module that only Triton's stub has."""

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from deploy import triton_model_file

Array = npt.NDArray[Any]


def backend(taken: Callable[[Array], Array], given: Callable[[Array], Array]) -> ModuleType:
    """`taken` is what becomes of an array handed to the stub, `given` of one that comes from it."""

    class Tensor:
        def __init__(self, name: str, array: Array) -> None:
            self._array = taken(array)

        @classmethod
        def from_dlpack(cls, name: str, tensor: torch.Tensor) -> "Tensor":
            made = cls(name, np.zeros(1))
            made._array = given(tensor.numpy())
            return made

        def as_numpy(self) -> Array:
            return self._array

    module = ModuleType("triton_python_backend_utils")
    module.__dict__["Tensor"] = Tensor
    return module


def model_file(monkeypatch: pytest.MonkeyPatch, utils: ModuleType) -> ModuleType:
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    spec = importlib.util.spec_from_file_location("triton_model_under_test", triton_model_file())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def whole(array: Array) -> Array:
    return array


def first_everywhere(array: Array) -> Array:
    """What Triton 2.51 makes of arrays of numpy 2."""
    return np.full_like(array, array.flat[0])


def test_a_numpy_that_the_stub_understands_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    model_file(monkeypatch, backend(whole, whole))._check_arrays()


@pytest.mark.parametrize(("taken", "given"), [(first_everywhere, whole), (whole, first_everywhere)])
def test_a_numpy_that_the_stub_corrupts_does_not_serve(
    monkeypatch: pytest.MonkeyPatch, taken: Callable[[Array], Array], given: Callable[[Array], Array]
) -> None:
    module = model_file(monkeypatch, backend(taken, given))
    with pytest.raises(RuntimeError, match="corrupt arrays: install numpy<2"):
        module._check_arrays()
    with pytest.raises(RuntimeError, match="corrupt arrays"):
        module.TritonPythonModel().initialize({})
