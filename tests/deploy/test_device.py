"""A program on another device, by torch's fake tensors: no kernel runs, but each tensor has its device."""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from deploy import served_program
from deploy.program import Precision
from deploy.served_program import FILES
from recsys.models import MODELS
from tests.deploy.test_program import MAX_ROWS, saved, split_of
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
    programs = {tmp_path / files.portable: torch.export.load(tmp_path / files.portable) for files in FILES.values()}
    monkeypatch.setattr(served_program, "load_weights", lambda path: weights)
    monkeypatch.setattr(torch.export, "load", programs.__getitem__)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    devices: list[torch.device] = []
    to_cpu = torch.Tensor.cpu

    def noted(tensor: torch.Tensor) -> torch.Tensor:
        devices.append(tensor.device)
        return to_cpu(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", noted)
    ids_BS, floats_BN = random_rows(schema, MAX_ROWS)
    sides = [(ids_BS[:, part.ids], floats_BN[:, part.floats]) for part in reversed(split_of(schema))]
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        program = served_program.load_program(tmp_path, device="cuda:1")
        assert program.ranked is not None
        scores = program(ids_BS, floats_BN), program.ranked(*sides[0], *sides[1], torch.arange(MAX_ROWS))
    assert devices == [torch.device("cuda:1")] * 2
    assert [(score_BT.device.type, score_BT.shape[0]) for score_BT in scores] == [("cpu", MAX_ROWS)] * 2
