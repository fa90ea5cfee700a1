"""What is written from the code is up to date."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from etl.spec import FeatureSpec
from recsys.models import MODELS
from scripts.write_plans import BLOCK, PAGE, shown

ROOT = Path(__file__).resolve().parents[2]


def test_the_tables_are_what_the_code_and_the_figures_say() -> None:
    line = [sys.executable, "scripts/write_docs.py", "--check"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_plan_of_16_gpus_is_what_the_code_prints() -> None:
    """The first of the page's plans; the others take longer."""
    block = BLOCK.search(PAGE.read_text(encoding="utf-8"))
    assert block and block["command"].endswith("scale.toml --world-size 16")
    assert shown(block) == block[0]


def test_every_model_has_its_place_in_the_page() -> None:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert [kind for kind in MODELS if f"## `{kind}`" not in text] == []


def test_the_examples_of_the_etl_page_load() -> None:
    text = (ROOT / "docs" / "etl.md").read_text(encoding="utf-8")
    examples = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        FeatureSpec.model_validate(tomllib.loads(example))
