"""Versions come and go under load on a real server: no request fails, and a broken version never takes one."""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import tritonclient.grpc as triton_grpc
from safetensors.torch import load_file, save_file

from deploy.client import Client
from deploy.control import Server
from deploy.publish import publish, rollback
from deploy.repository import CANDIDATE, Repository
from etl.artifact import sha256
from etl.faults import Fault
from etl.sources import read_rows

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 120.0
Change = Callable[[Path], None]


def reseal(bundle: Path) -> None:
    """The manifest says again what is there, as an export of something else would."""
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["files"] = {name: sha256(bundle / name) for name in manifest["files"]}
    (bundle / "bundle.json").write_text(json.dumps(manifest))


def changed(bundle: Path, name: str, change: Change) -> Path:
    copy = shutil.copytree(bundle, bundle.parent / name)
    change(copy)
    reseal(copy)
    return copy


def retrained(bundle: Path) -> None:
    """Another bundle of the same scores."""
    (bundle / "experiment.json").write_text((bundle / "experiment.json").read_text() + "\n")


def other_weights(bundle: Path) -> None:
    path = bundle / "weights.safetensors"
    save_file({name: _moved(tensor) for name, tensor in load_file(path).items()}, path)


def _moved(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 1.5 if tensor.is_floating_point() else tensor


def ranks_otherwise(bundle: Path) -> None:
    """Rows score as before; of a user and its candidates every score is another one."""
    code, call = (bundle / "ranking.py").read_text(), "fault or Ranked(score_BT[piece],"
    assert call in code
    (bundle / "ranking.py").write_text(code.replace(call, "fault or Ranked(score_BT[piece] * 0.5,"))


def no_load(bundle: Path) -> None:
    (bundle / "model.py").write_text("raise ValueError('no table of this name')")


def dies_at_load(bundle: Path) -> None:
    (bundle / "model.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")


def dies_at_first_request(bundle: Path) -> None:
    end = "import os\nTritonPythonModel.execute = lambda self, requests: os._exit(1)\n"
    (bundle / "model.py").write_text((bundle / "model.py").read_text() + end)


@contextmanager
def serving(folder: Path, *options: object) -> Iterator[tuple["subprocess.Popen[str]", Server]]:
    """A `deploy serve`, and how to reach it."""
    state = folder.parent / "server.json"
    line = [sys.executable, "-m", "deploy", "serve", str(folder), *map(str, options)]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            end = time.monotonic() + WAIT_S
            while not state.is_file():
                assert server.poll() is None, server.stdout.read() if server.stdout else ""
                assert time.monotonic() < end, "no state file"
                time.sleep(0.05)
            told = json.loads(state.read_text())
            yield server, Server(f"127.0.0.1:{told['grpc_port']}", Path(told["key_file"]))
        finally:
            server.terminate()
            server.wait(WAIT_S)


class Load:
    """Clients that send one request after another, each another slice of the golden rows, and check each answer."""

    def __init__(self, url: str, bundle: Path, *, clients: int = 4) -> None:
        self.answers: Counter[str] = Counter()
        self._stop, self._threads = threading.Event(), ThreadPoolExecutor(max_workers=clients)
        self._running = [self._threads.submit(self._send, url, bundle) for _ in range(clients)]

    def _send(self, url: str, bundle: Path) -> None:
        with Client(url) as client:
            rows = read_rows(bundle / "golden" / "requests.jsonl", client.columns)
            wanted = client.score(rows).score
            at = 0
            while not self._stop.is_set():
                at = (at + 1) % (rows.num_rows - 4)
                try:
                    got = client.score(rows.slice(at, 4)).score
                    self.answers["right" if abs(got - wanted[at : at + 4]).max() < 1e-6 else "wrong"] += 1
                except Fault as fault:
                    self.answers[str(fault)] += 1

    def until(self, requests: int) -> None:
        """Returns when as many requests more have been answered."""
        end, goal = time.monotonic() + WAIT_S, sum(self.answers.values()) + requests
        while sum(self.answers.values()) < goal:
            assert time.monotonic() < end, self.answers
            time.sleep(0.01)

    def finish(self) -> Counter[str]:
        self._stop.set()
        for running in self._running:
            running.result(WAIT_S)
        self._threads.shutdown()
        return self.answers


def served_versions(server: Server) -> list[tuple[str, str]]:
    client = triton_grpc.InferenceServerClient(server.url)
    headers = {"triton-grpc-protocol-admin": server.key_file.read_text()}
    index = client.get_model_repository_index(headers=headers)
    client.close()
    return [(model.name, model.version) for model in index.models if model.state == "READY"]


def until_served(server: Server, versions: list[tuple[str, str]]) -> None:
    end = time.monotonic() + WAIT_S
    while (now := served_versions(server)) != versions:
        assert time.monotonic() < end, now
        time.sleep(0.05)


class Pods:
    """Servers that load what they are told to but for those in `refusing`, in place of a connection to each."""

    def __init__(self, repository: Path) -> None:
        self._repository, self.refusing = Repository(repository), set[str]()
        self.served: dict[str, int | None] = {}

    @contextmanager
    def __call__(self, server: Server) -> Iterator["Pod"]:
        yield Pod(self, server.url, self._repository)


class Pod:
    def __init__(self, pods: Pods, url: str, repository: Repository) -> None:
        self._pods, self._url, self._repository = pods, url, repository

    def load(self, model: str) -> None:
        if model != CANDIDATE:
            version = self._repository.current()
            if self._url in self._pods.refusing and version != 1:
                raise Fault(self._url, got="no memory", wanted="a server that loads it", remedy="give it more")
            self._pods.served[self._url] = version

    def unload(self, model: str) -> None:
        pass

    def served_bundle(self, model: str, version: int) -> str | None:
        return sha256(self._repository.version(version) / "bundle.json")


def test_all_servers_of_a_repository_take_a_version_or_none(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository, urls = bundle.parent / "repository", ("a:1", "b:1", "c:1")
    pods, asked = Pods(repository), list[str]()
    monkeypatch.setattr("deploy.publish.ModelControl", pods)
    monkeypatch.setattr("deploy.publish._require_golden_scores", lambda *_, url, tls: asked.append(url))
    servers = [Server(url, bundle / "admin.key") for url in urls]
    publish(bundle, repository, servers=servers, keep=3)
    assert asked == list(urls), "the candidate is tried on each"
    assert pods.served == dict.fromkeys(urls, 1)
    pods.refusing.add("b:1")
    with pytest.raises(Fault, match="no memory"):
        publish(changed(bundle, "second", retrained), repository, servers=servers, keep=3)
    assert pods.served == dict.fromkeys(urls, 1), "the first one was told to go back"
    assert (Repository(repository).current(), Repository(repository).versions()) == (1, [1])
    pods.refusing.clear()
    assert publish(changed(bundle, "third", retrained), repository, servers=servers, keep=3).version == 2
    assert pods.served == dict.fromkeys(urls, 2)
    assert rollback(repository, servers=servers).version == 1
    assert pods.served == dict.fromkeys(urls, 1)


@pytest.mark.triton
def test_a_version_that_ranks_otherwise_than_offline_is_refused(bundle: Path) -> None:
    """Though it scores rows as it should."""
    repository = bundle.parent / "repository"
    with pytest.raises(Fault, match="golden rankings: 0 of 14 rows equal"):
        publish(changed(bundle, "wrong", ranks_otherwise), repository, servers=[], keep=3)
    assert (Repository(repository).current(), Repository(repository).versions()) == (None, [])


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.usefixtures("one_try")
def test_three_thousand_requests_over_swaps_broken_versions_and_a_rollback(bundle: Path) -> None:
    repository = bundle.parent / "repository"
    with serving(bundle) as (process, server):
        told = json.loads((bundle.parent / "server.json").read_text())
        load = Load(server.url, bundle)
        load.until(300)
        second = publish(changed(bundle, "second", retrained), repository, servers=[server], keep=3)
        assert (second.version, second.before, second.kept) == (2, 1, (1, 2))
        load.until(300)
        with pytest.raises(Fault, match=r"golden requests: [0-9] of 14 rows equal"):
            publish(changed(bundle, "wrong", other_weights), repository, servers=[server], keep=3)
        load.until(300)
        for name, broken in (("no_load", no_load), ("dead", dies_at_load), ("dying", dies_at_first_request)):
            with pytest.raises(Fault):
                publish(changed(bundle, name, broken), repository, servers=[server], keep=3)
            assert Repository(repository).versions() == [1, 2]
        third = publish(
            changed(bundle, "third", lambda b: retrained(b) or retrained(b)), repository, servers=[server], keep=2
        )
        assert (third.version, third.before, third.kept) == (3, 2, (2, 3))
        until_served(server, [("ranker", "3")])
        load.until(300)
        back = rollback(repository, servers=[server])
        assert (back.version, back.before, back.kept) == (2, 3, (2,))
        until_served(server, [("ranker", "2")])
        load.until(max(300, 3000 - sum(load.answers.values())))
        answers = load.finish()
        assert set(answers) == {"right"}
        assert answers["right"] >= 3000
        assert json.loads((bundle.parent / "server.json").read_text())["pid"] == told["pid"], "the server was restarted"
        assert process.poll() is None
        log = (bundle.parent / "server" / "tritonserver.log").read_text()
    assert "no table of this name" in log
    assert not (repository / CANDIDATE).exists()
    assert not list(Path("/dev/shm").glob(f"{told['server_id']}*"))
