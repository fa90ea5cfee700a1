"""What is written from the code is up to date."""

import subprocess
import sys
from pathlib import Path

from recsys.models import MODELS

ROOT = Path(__file__).resolve().parents[2]


def test_the_tables_are_what_the_code_and_the_figures_say() -> None:
    line = [sys.executable, "scripts/write_docs.py", "--check"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_model_has_its_place_in_the_page() -> None:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert [kind for kind in MODELS if f"## `{kind}`" not in text] == []
