"""A rank killed at a random moment, and the same command given again: the end is that of the run nobody killed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.dist]

ROOT = Path(__file__).parents[2]


def test_training_comes_to_the_same_end_after_a_kill() -> None:
    line = [sys.executable, "benchmarks/chaos.py", "--quick"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"kills": 3, "identical": 3, "hangs": 0}, done.stdout
