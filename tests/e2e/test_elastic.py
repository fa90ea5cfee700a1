"""Ranks that die or fail: the others end soon and say who it was."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.dist

ROOT = Path(__file__).parents[2]
DEAD_AFTER_S = 3.0
WORKER = """
import sys, time
from etl.faults import exit_on_fault
from recsys.parallel.world import barrier, open_world

with exit_on_fault(), open_world("cpu", dead_after_s=float(sys.argv[1])) as world:
    barrier()
    sys.stdout.write("joined\\n")
    sys.stdout.flush()
    if world.rank == 1:
        sys.stdin.read()
        raise RuntimeError("of its own")
    barrier()
"""


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two ranks; rank 0 waits in a collective for rank 1, which waits for a word."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = []
    for rank in range(2):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        own = os.environ | where | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(subprocess.Popen([sys.executable, script, str(DEAD_AFTER_S)], env=own, text=True, **pipes))
    assert all(rank.stdout and rank.stdout.readline() == "joined\n" for rank in ranks)
    yield ranks
    for rank in ranks:
        rank.kill()
        rank.communicate()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "silent"])
def test_a_dead_rank_ends_the_other_one_which_names_it(pair: list[subprocess.Popen[str]], how: signal.Signals) -> None:
    """A stopped process keeps its connections open, as a host without power seems to."""
    pair[1].send_signal(how)
    _, said = pair[0].communicate(timeout=20 * DEAD_AFTER_S)
    assert pair[0].returncode in (1, 2)
    assert f"rank 1 on {socket.gethostname()} (process {pair[1].pid})" in said, said
    assert ("ended without a word" if how == signal.SIGKILL else f"silent for {DEAD_AFTER_S:g} s") in said


def test_a_rank_that_fails_tells_the_other_one_why(pair: list[subprocess.Popen[str]]) -> None:
    _, own = pair[1].communicate("go\n", timeout=20 * DEAD_AFTER_S)
    _, said = pair[0].communicate(timeout=20 * DEAD_AFTER_S)
    assert "RuntimeError: of its own" in own
    assert pair[0].returncode in (1, 2) and "ended: of its own" in said, said
