"""Every sharding type on 1, 2 and 4 ranks with every optimizer: the losses of one process with plain torch tables."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.dist
def test_losses_do_not_depend_on_the_sharding() -> None:
    line = [sys.executable, "benchmarks/sharding.py", "--quick"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["cells"] == 3 * (8 * 6 - 3), done.stdout
    assert figures["largest_difference"] < 1e-6, done.stdout
