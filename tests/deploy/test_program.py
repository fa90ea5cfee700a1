"""The served program equals the trained network, and carries code alone."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

from deploy.export import served_network
from deploy.program import Lookup, ServedNetwork, save_program
from deploy.ranker import load_program
from etl.schema import DenseFeature, IdFeature, Schema, Table, TaskColumn
from recsys.models import MODELS
from recsys.models.head import Sizes
from recsys.network import Layout, Network

MAX_ROWS = 16
ROWS = {"site": 5, "city": 7, "site_x_city": 11}


def schema(*, dense: int) -> Schema:
    features = [
        IdFeature(name=name, type="categorical", table=name, linear_only=name == "site_x_city") for name in ROWS
    ]
    return Schema(
        features=(features[0], features[2], features[1]),
        dense=tuple(DenseFeature(name=f"x{at}") for at in range(dense)),
        tables=tuple(Table(name=name, rows=rows) for name, rows in ROWS.items()),
        tasks=tuple(TaskColumn(name=name, positive_rate=0.5) for name in ("click", "buy")),
    )


def network(kind: str, found: Schema) -> Network:
    """Every weight is random: a zero would hide a wrong lookup."""
    config = MODELS[kind]()
    layout = Layout.of(found, config, dim=4)
    head = config.build(Sizes(layout.vectors, layout.dim, len(found.dense), len(found.tasks)))
    tables = [
        EmbeddingBagConfig(name=name, num_embeddings=ROWS[name], embedding_dim=width, feature_names=[name])
        for name, width in layout.widths().items()
    ]
    net = Network(layout, tables=EmbeddingBagCollection(tables=tables), head=head)
    generator = torch.Generator().manual_seed(7)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return net.eval()


@pytest.mark.parametrize("dense", [0, 3])
@pytest.mark.parametrize("kind", list(MODELS))
def test_the_program_scores_as_the_network_does(kind: str, dense: int, tmp_path: Path) -> None:
    found = schema(dense=dense)
    net = network(kind, found)
    save_program(served_network(net), tmp_path, max_rows=MAX_ROWS, features=3, dense=dense)
    program = load_program(tmp_path)
    generator = torch.Generator().manual_seed(8)
    for rows in (1, 2, 7, MAX_ROWS):
        columns = [torch.randint(0, ROWS[f.table], (rows,), generator=generator) for f in found.features]
        ids_BF, dense_BN = torch.stack(columns, dim=1), torch.randn(rows, dense, generator=generator)
        with torch.no_grad():
            wanted_BT = net(ids_BF, dense_BN).sigmoid()
            got_BT = program(ids_BF, dense_BN)
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

    served = ServedNetwork(Hidden(), vectors=None, weights=None, dim=4)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="wanted code alone"):
        save_program(served, tmp_path, max_rows=4, features=1, dense=1)


def test_features_of_one_table_share_its_rows() -> None:
    tables = {"a": torch.tensor([[0.0], [1.0]]), "b": torch.tensor([[10.0], [11.0], [12.0]])}
    lookup = Lookup([2, 0, 1], names=["b", "a", "b"], tables=tables)
    assert lookup.matrix_RW.shape == (5, 1)
    assert lookup(torch.tensor([[1, 2, 0]])).flatten().tolist() == [10.0, 1.0, 12.0]
