"""A program on another device, by torch's fake tensors: no kernel runs, but each tensor has its device."""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from deploy import served_program
from deploy.program import Precision
from recsys.models import MODELS
from tests.deploy.test_program import MAX_ROWS, saved
from tests.registry import config_of, network_of, random_rows, rich_schema

LOWER = (Precision("int8", "bf16"), Precision("fp16", "fp32"))


@pytest.mark.parametrize(
    ("kind", "precision"), [*((kind, Precision()) for kind in MODELS), *(("deepfm", each) for each in LOWER)], ids=str
)
def test_all_of_a_program_computes_on_the_device(
    kind: str, precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = rich_schema(dense=2)
    saved(network_of(config_of(kind), schema, std=0.1), schema, tmp_path, precision=precision, level=None)
    weights = served_program.load_weights(tmp_path / "weights.safetensors")
    program = torch.export.load(tmp_path / "program.pt2")
    monkeypatch.setattr(served_program, "load_weights", lambda path: weights)
    monkeypatch.setattr(torch.export, "load", lambda path: program)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    devices: list[torch.device] = []
    to_cpu = torch.Tensor.cpu

    def noted(tensor: torch.Tensor) -> torch.Tensor:
        devices.append(tensor.device)
        return to_cpu(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", noted)
    with FakeTensorMode(allow_non_fake_inputs=True):
        forward = served_program.load_program(tmp_path, device="cuda:1")
        score_BT = forward(*random_rows(schema, MAX_ROWS))
    assert devices == [torch.device("cuda:1")]
    assert (score_BT.device.type, score_BT.shape[0]) == ("cpu", MAX_ROWS)
