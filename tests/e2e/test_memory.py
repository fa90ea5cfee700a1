"""What `recsys plan` says of memory is what training takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_the_forecast_is_within_15_percent_of_the_peak() -> None:
    line = [sys.executable, "benchmarks/memory.py", "--quick"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1])["largest_error"] < 0.15, done.stdout
