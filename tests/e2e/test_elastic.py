"""Ranks and hosts that die: the others end soon and say who it was, and torchrun goes on from the last checkpoint."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from recsys.checkpoint import latest
from recsys.parallel.state import read_tensors
from recsys.progress import quiet_libraries
from tests.e2e.test_ranks import toml
from tests.recsys.conftest import RAW, write_dataset

pytestmark = pytest.mark.dist

ROOT = Path(__file__).parents[2]
DEAD_AFTER_S = 6.0
CLOSED_S, SILENT_S, FAILED_S = 45.0, DEAD_AFTER_S + 30, 45.0
"""When the others have ended for certain where a rank is killed, is silent, or fails and says why: three times what
docs/distributed.md says, as other work may run beside the tests."""

ONE_HOST = ("--standalone", "--nproc-per-node=2", "--max-restarts=2")
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


EARLY = """
import os, sys, time
from etl.faults import exit_on_fault
from recsys.parallel.meeting import meeting
from recsys.parallel.world import open_world

with exit_on_fault():
    if os.environ["RANK"] == "0":
        open_world("cpu", dead_after_s=float(sys.argv[1])).__enter__()
    with meeting(1, 2, dead_after_s=float(sys.argv[1])):
        sys.stdout.write("met\\n")
        sys.stdout.flush()
        sys.stdin.read()
"""


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two ranks; rank 0 waits in a collective for rank 1, which waits for a word."""
    with two_ranks(tmp_path, WORKER) as ranks:
        assert all(rank.stdout and rank.stdout.readline() == "joined\n" for rank in ranks)
        yield ranks


@contextlib.contextmanager
def two_ranks(folder: Path, worker: str) -> Iterator[list[subprocess.Popen[str]]]:
    script = folder / "worker.py"
    script.write_text(worker)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = []
    for rank in range(2):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        own = os.environ | where | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(subprocess.Popen([sys.executable, script, str(DEAD_AFTER_S)], env=own, text=True, **pipes))
    yield ranks
    for rank in ranks:
        rank.kill()
        rank.communicate()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "silent"])
def test_a_dead_rank_ends_the_other_one_which_names_it(pair: list[subprocess.Popen[str]], how: signal.Signals) -> None:
    """A stopped process keeps its connections open, as a host without power seems to."""
    pair[1].send_signal(how)
    _, said = pair[0].communicate(timeout=CLOSED_S if how == signal.SIGKILL else SILENT_S)
    assert pair[0].returncode in (1, 2)
    assert f"rank 1 on {socket.gethostname()} (process {pair[1].pid})" in said, said
    assert ("ended without a word" if how == signal.SIGKILL else f"silent for {DEAD_AFTER_S:g} s") in said


def test_a_rank_that_fails_tells_the_other_one_why(pair: list[subprocess.Popen[str]]) -> None:
    _, own = pair[1].communicate("go\n", timeout=20 * DEAD_AFTER_S)
    _, said = pair[0].communicate(timeout=FAILED_S)
    assert "RuntimeError: of its own" in own
    assert pair[0].returncode in (1, 2) and "ended: of its own" in said, said


def test_the_rank_that_keeps_the_store_fails_by_its_own_error_and_lets_the_other_one_read_it(tmp_path: Path) -> None:
    with two_ranks(tmp_path, WORKER.replace("rank == 1", "rank == 0")) as ranks:
        assert all(rank.stdout and rank.stdout.readline() == "joined\n" for rank in ranks)
        _, own = ranks[0].communicate("go\n", timeout=20 * DEAD_AFTER_S)
        _, said = ranks[1].communicate(timeout=FAILED_S)
    assert "RuntimeError: of its own" in own, own
    assert ranks[1].returncode in (1, 2) and "ended: of its own" in said, said


def test_a_rank_that_dies_before_all_are_connected_is_named(tmp_path: Path) -> None:
    with two_ranks(tmp_path, EARLY) as ranks:
        assert ranks[1].stdout and ranks[1].stdout.readline() == "met\n"
        ranks[1].kill()
        _, said = ranks[0].communicate(timeout=SILENT_S)
    assert f"rank 1 on {socket.gethostname()} (process {ranks[1].pid})" in said, said
    assert ranks[0].returncode in (1, 2)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset, an experiment that saves often, and its run on two ranks that nobody killed."""
    folder = tmp_path_factory.mktemp("elastic")
    write_dataset(folder / "data")
    saving = {"checkpoint_every_steps": 5, "batch_size": 32, "epochs": 2, "dead_after_s": DEAD_AFTER_S}
    sections = RAW | {"train": RAW["train"] | saving, "embedding": RAW["embedding"] | {"sharding": "row_wise"}}
    (folder / "known.toml").write_text("".join(f"{key} = {toml(value)}\n" for key, value in sections.items()))
    done = subprocess.run(torchrun(folder, "whole", *ONE_HOST), cwd=ROOT, capture_output=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    return folder


def torchrun(folder: Path, name: str, *options: str) -> list[str]:
    own = ["-m", "recsys", "train", str(folder / "known.toml")]
    where = ["--data", str(folder / "data"), "--run-dir", str(folder / name)]
    return [sys.executable, "-m", "torch.distributed.run", *options, *own, *where]


def await_checkpoint(run: Path, *, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 200
    while not list(run.glob("checkpoints/step-*/complete")):
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.02)


def ranks_of(torchrun: subprocess.Popen[bytes]) -> dict[int, int]:
    """Rank -> process id."""
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    own = {child: Path(f"/proc/{child}/environ").read_text().split("\0") for child in children}
    return {int(line[5:]): int(child) for child, lines in own.items() for line in lines if line.startswith("RANK=")}


def exact(run: Path) -> tuple[dict[str, object], dict[str, bytes]]:
    """The result, and every weight and state."""
    quiet_libraries()
    result = json.loads((run / "result.json").read_text())
    newest = latest(run)
    assert newest and newest[1].finished
    tensors = {name: tensor.numpy().tobytes() for name, tensor in read_tensors(newest[0]).items()}
    return {key: value for key, value in result.items() if "second" not in key}, tensors


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_restarts_after_a_kill_and_comes_to_the_same_end(prepared: Path, rank: int) -> None:
    name, log = f"rank-{rank}-killed", prepared / f"rank-{rank}.log"
    with log.open("wb") as said:
        process = subprocess.Popen(torchrun(prepared, name, *ONE_HOST), cwd=ROOT, stdout=said, stderr=said)
    await_checkpoint(prepared / name, process=process)
    os.kill(ranks_of(process)[rank], signal.SIGKILL)
    try:
        assert process.wait(timeout=200) == 0, log.read_text()[-4000:]
    finally:
        process.terminate()
        process.wait()
    assert f"failed (exitcode: -9) local_rank: {rank}" in log.read_text()
    assert exact(prepared / name) == exact(prepared / "whole")


@pytest.mark.slow
def test_ranks_end_with_their_torchrun_and_the_same_command_goes_on(prepared: Path) -> None:
    log = prepared / "alone.log"
    with log.open("wb") as said:
        process = subprocess.Popen(torchrun(prepared, "alone", *ONE_HOST), cwd=ROOT, stdout=said, stderr=said)
    await_checkpoint(prepared / "alone", process=process)
    ranks = ranks_of(process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + FAILED_S
    while any(Path(f"/proc/{pid}").exists() for pid in ranks.values()):
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.1)
    assert not (prepared / "alone" / "result.json").exists(), "they trained on"
    again = torchrun(prepared, "alone", *ONE_HOST)
    done = subprocess.run(again, cwd=ROOT, capture_output=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    assert exact(prepared / "alone") == exact(prepared / "whole")


@pytest.fixture
def hosts() -> Iterator[dict[str, str]]:
    """Two network namespaces with a cable between them: name -> address."""
    names = {f"{side}-{os.getpid()}": f"10.231.7.{at}" for at, side in enumerate(("left", "right"), start=1)}
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    if subprocess.run(["ip", "netns", "add", next(iter(names))], capture_output=True, check=False).returncode:
        pytest.skip("network namespaces are not permitted here")
    try:
        left, right = names
        call("ip", "netns", "add", right)
        call("ip", "link", "add", "cable", "netns", left, "type", "veth", "peer", "name", "cable", "netns", right)
        for name, address in names.items():
            call("ip", "-n", name, "address", "add", f"{address}/24", "dev", "cable")
            call("ip", "-n", name, "link", "set", "lo", "up")
            call("ip", "-n", name, "link", "set", "cable", "up")
        yield names
    finally:
        for name in names:
            lose_power(name)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def call(*line: str) -> str:
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout


def lose_power(host: str) -> None:
    """The cable is dead first, so that nobody hears a connection close."""
    with contextlib.suppress(subprocess.CalledProcessError):
        call("ip", "-n", host, "link", "set", "cable", "down")
        for pid in call("ip", "netns", "pids", host).split():
            os.kill(int(pid), signal.SIGKILL)


def host_process(folder: Path, host: str, *, hosts: dict[str, str], run: str) -> subprocess.Popen[bytes]:
    """torchrun on a host: one rank; the first host keeps the rendezvous."""
    first = next(iter(hosts))
    rendezvous = f"is_host={str(host == first).lower()},keep_alive_interval=1,keep_alive_max_attempt=3"
    options = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=known"]
    options += [f"--rdzv-endpoint={hosts[first]}:29511", f"--rdzv-conf={rendezvous}", f"--local-addr={hosts[host]}"]
    train = torchrun(folder, run, *options)
    start = ["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', host]
    own = os.environ | {"GLOO_SOCKET_IFNAME": "cable", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with (folder / f"{run}-{host}.log").open("ab") as log:
        return subprocess.Popen([*start, *train], cwd=ROOT, env=own, stdout=log, stderr=log)


def on_hosts(folder: Path, hosts: dict[str, str], *, run: str) -> list[subprocess.Popen[bytes]]:
    """torchrun on each host, once the run has a checkpoint."""
    processes = [host_process(folder, host, hosts=hosts, run=run) for host in hosts]
    await_checkpoint(folder / run, process=processes[0])
    return processes


def await_name(log: Path, *, what: str) -> None:
    deadline = time.monotonic() + SILENT_S
    while not re.search(what, log.read_text()):
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.1)


@pytest.mark.slow
def test_a_host_that_loses_power_is_named_and_comes_back(prepared: Path, hosts: dict[str, str]) -> None:
    left, right = hosts
    processes = on_hosts(prepared, hosts, run="hosts")
    lose_power(right)
    processes[1].wait()
    named = rf"rank \d on {left} .* ends, since rank \d on {right} .* has been silent"
    await_name(prepared / f"hosts-{left}.log", what=named)
    assert not (prepared / "hosts" / "result.json").exists(), "it ended before the power was lost"
    call("ip", "-n", right, "link", "set", "cable", "up")
    processes[1] = host_process(prepared, right, hosts=hosts, run="hosts")
    for process, host in zip(processes, hosts, strict=True):
        assert process.wait(timeout=200) == 0, (prepared / f"hosts-{host}.log").read_text()[-4000:]
    assert exact(prepared / "hosts") == exact(prepared / "whole")


@pytest.mark.slow
def test_the_host_of_the_rendezvous_that_loses_power_is_named(prepared: Path, hosts: dict[str, str]) -> None:
    """Its store is gone as well: nothing can be restarted but by starting torchrun on both hosts."""
    left, right = hosts
    processes = on_hosts(prepared, hosts, run="first-lost")
    lose_power(left)
    named = rf"rank \d on {right} .* ends, since .*rank \d on {left} "
    await_name(prepared / f"first-lost-{right}.log", what=named)
    lose_power(right)
    for process in processes:
        process.wait()
