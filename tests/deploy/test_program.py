"""The served program equals the trained network, and carries code alone."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from deploy.export import served_network
from deploy.program import Lookup, ServedNetwork, save_program
from deploy.served_program import load_program
from recsys.layout import Layout
from recsys.models import MODELS
from recsys.models.wide import WideConfig
from tests.registry import config_of, network_of, random_rows, rich_schema, schema_of

MAX_ROWS = 16


@pytest.mark.parametrize("dense", [0, 3])
@pytest.mark.parametrize("kind", list(MODELS))
def test_the_program_scores_as_the_network_does(kind: str, dense: int, tmp_path: Path) -> None:
    schema = rich_schema(dense=dense)
    network = network_of(config_of(kind), schema, std=0.1)
    floats = len(schema.float_names)
    save_program(served_network(network), tmp_path, max_rows=MAX_ROWS, slots=len(schema.slot_names), floats=floats)
    program = load_program(tmp_path)
    for rows in (1, 2, 7, MAX_ROWS):
        ids_BS, floats_BN = random_rows(schema, rows)
        with torch.no_grad():
            wanted_BT = network(ids_BS, floats_BN).logits_BT.sigmoid()
            got_BT = program(ids_BS, floats_BN)
        torch.testing.assert_close(got_BT, wanted_BT, rtol=0, atol=1e-6)
        assert rows == 1 or wanted_BT.std() > 1e-3


def test_the_program_holds_no_weight_and_loads_without_our_packages(exported: Path) -> None:
    weights, program = exported / "weights.safetensors", exported / "program.pt2"
    changed = np.frombuffer(weights.read_bytes(), np.uint8)
    assert changed[-64:].tobytes() not in program.read_bytes()
    code = (
        "import sys, torch; program = torch.export.load(sys.argv[1]);"
        "sys.exit(bool(program.state_dict or program.constants or {'etl', 'recsys', 'deploy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code, str(program)], cwd="/", capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_a_program_with_pickled_weights_is_refused(tmp_path: Path, exported: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes((exported / "weights.safetensors").read_bytes())
    linear = torch.nn.Linear(2, 2)
    torch.export.save(torch.export.export(linear, (torch.zeros(1, 2),)), tmp_path / "program.pt2")
    with pytest.raises(ValueError, match="wanted code alone"):
        load_program(tmp_path)


def test_a_head_with_hidden_tensors_is_not_exported(tmp_path: Path) -> None:
    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.secret = [torch.ones(1)]

        def forward(self, inputs: object) -> torch.Tensor:
            return inputs.dense_BN + self.secret[0]  # type: ignore[attr-defined]

    layout = Layout.of(schema_of((), dense=1, tasks=("click",)), WideConfig(), dim=4)
    served = ServedNetwork(Hidden(), layout, rows=None, weights=None)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="wanted code alone"):
        save_program(served, tmp_path, max_rows=4, slots=0, floats=1)


def test_features_of_one_table_share_its_rows() -> None:
    tables = {"a": torch.tensor([[0.0], [1.0]]), "b": torch.tensor([[10.0], [11.0], [12.0]])}
    lookup = Lookup([2, 0, 1], names=["b", "a", "b"], tables=tables)
    assert lookup.matrix_RW.shape == (5, 1)
    assert lookup(torch.tensor([[1, 2, 0]])).flatten().tolist() == [10.0, 1.0, 12.0]
