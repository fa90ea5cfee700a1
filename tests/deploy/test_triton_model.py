"""The model file itself, with a stand-in for the module that only Triton's stub has."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from deploy import triton_model_file

PACKAGE = "rankforge_bundle"  # as which the model file knows its neighbours
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


def model_file(monkeypatch: pytest.MonkeyPatch, utils: ModuleType, path: Path) -> ModuleType:
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        monkeypatch.delitem(sys.modules, name)
    spec = importlib.util.spec_from_file_location("triton_model_under_test", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("kind", "device"), [("CPU", "cpu"), ("GPU", "cuda:3")])
def test_an_instance_computes_where_its_group_puts_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, device: str
) -> None:
    shutil.copy(triton_model_file(), tmp_path / "model.py")
    for name in ("transform", "ranker"):
        (tmp_path / f"{name}.py").touch()
    (tmp_path / "served_program.py").write_text("def load_program(folder, *, device): raise ValueError(device)")
    module = model_file(monkeypatch, backend(whole, whole), tmp_path / "model.py")
    config = json.dumps({"parameters": {"signature": {"string_value": "{}"}}})
    args = {"model_config": config, "model_instance_kind": kind, "model_instance_device_id": "3"}
    with pytest.raises(ValueError, match=f"^{device}$"):
        module.TritonPythonModel().initialize(args)


def whole(array: Array) -> Array:
    return array


def first_everywhere(array: Array) -> Array:
    """What Triton 2.51 makes of arrays of numpy 2."""
    return np.full_like(array, array.flat[0])


def test_a_numpy_that_the_stub_understands_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    model_file(monkeypatch, backend(whole, whole), triton_model_file())._check_arrays()


@pytest.mark.parametrize(("taken", "given"), [(first_everywhere, whole), (whole, first_everywhere)])
def test_a_numpy_that_the_stub_corrupts_does_not_serve(
    monkeypatch: pytest.MonkeyPatch, taken: Callable[[Array], Array], given: Callable[[Array], Array]
) -> None:
    module = model_file(monkeypatch, backend(taken, given), triton_model_file())
    with pytest.raises(RuntimeError, match="corrupt arrays: install numpy<2"):
        module._check_arrays()
    with pytest.raises(RuntimeError, match="corrupt arrays"):
        module.TritonPythonModel().initialize({})
