"""A model that a user adds: one file beside the others and its name in the registry, and everything knows it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE = '''"""Each field's vector weighed by one number (an example of a new model)."""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from recsys.models.head import Head, Inputs, ModelConfig, Sizes


class FieldSumConfig(ModelConfig):
    """The sum of all vectors, weighed."""

    paper: ClassVar[str] = "https://example.org/field-sum"
    linear: ClassVar[bool] = False
    kind: Literal["field_sum"] = "field_sum"
    bias: bool = Field(True, description="whether the logit has a bias")

    def head(self, sizes: Sizes) -> Head:
        return FieldSum(self, sizes)


class FieldSum(Head):
    """logit = w . [vectors, dense inputs] + b."""

    def __init__(self, config: FieldSumConfig, sizes: Sizes) -> None:
        super().__init__()
        self.out = nn.Linear(sizes.deep, len(sizes.tasks), bias=config.bias)

    def forward(self, inputs: Inputs) -> Tensor:
        logits_BT: Tensor = self.out(inputs.deep_BD())
        return logits_BT
'''


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources with the new file, and the registry with the new name."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("etl", "recsys", "deploy", "scripts", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("data", "experiments"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "README.md", folder)
    (folder / "recsys" / "models" / "field_sum.py").write_text(FILE)
    registry = folder / "recsys" / "models" / "__init__.py"
    text = registry.read_text()
    text = text.replace(
        "from recsys.models.final_mlp",
        "from recsys.models.field_sum import FieldSumConfig\n" + "from recsys.models.final_mlp",
    )
    registry.write_text(text.replace("    | BSTConfig,", "    | BSTConfig\n    | FieldSumConfig,"))
    return folder


def run(folder: Path, *line: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, *line]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_command_line_and_the_documentation_know_it(checkout: Path) -> None:
    listed = json.loads(run(checkout, "-m", "recsys", "models", "--json"))
    assert listed["field_sum"]["paper"] == "https://example.org/field-sum"
    run(checkout, "scripts/write_docs.py")
    page = (checkout / "docs" / "models.md").read_text()
    assert "## `field_sum`" in page and "| `bias` | `true` | whether the logit has a bias |" in page
    assert "docs/models.md#field_sum" in (checkout / "README.md").read_text()


@pytest.mark.slow
def test_it_trains_and_is_exported(checkout: Path) -> None:
    experiment = ["experiments/demo.toml", "--set", "name=new", "--set", "model={kind='field_sum'}"]
    run(checkout, "-m", "etl", "run", *experiment)
    run(checkout, "-m", "recsys", "train", *experiment, "--set", "train.epochs=2")
    result = json.loads((checkout / "out" / "new" / "run" / "result.json").read_text())
    assert result["test"]["auc"] > 0.9
    run(checkout, "-m", "deploy", "export", "out/new/run", "--out", "out/new/bundle")
    assert (checkout / "out" / "new" / "bundle" / "bundle.json").is_file()
