"""What `recsys plan` says of memory is what training takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import memory

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_the_forecast_is_within_15_percent_of_the_peak() -> None:
    """Of every model there, the benchmark's own bound being that."""
    line = [sys.executable, "benchmarks/memory.py"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.count("off by") == 4 and json.loads(done.stdout.splitlines()[-1])["largest_error"] < 0.15


def test_a_forecast_that_is_far_off_fails_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["memory.py", "--quick"])
    monkeypatch.setattr(memory, "peak_bytes", lambda command: 1 << 40)
    with pytest.raises(SystemExit) as end:
        memory.main()
    assert end.value.code == 1
