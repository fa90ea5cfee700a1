"""What is said where a machine lacks something."""

from collections.abc import Callable

import pytest
import torch

from recsys.experiment import Experiment
from recsys.machine import slow_precision


def test_emulated_bf16_is_told(monkeypatch: pytest.MonkeyPatch, experiment: Callable[..., Experiment]) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert "bf16" in (slow_precision(experiment(train={"precision": "bf16"}).train) or "")
    assert slow_precision(experiment().train) is None
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert slow_precision(experiment(train={"precision": "bf16"}).train) is None
