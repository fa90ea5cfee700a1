"""The examples of docs/serving.md, executed as they stand, against a real server."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from deploy.bundle import read_bundle
from deploy.client import Client
from tests.deploy.conftest import ROOT, Served
from tests.deploy.test_serving import WAIT_S, serving

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
CLIENT, PACK, GRPC = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
ROWS, RANKING = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def tiny_served(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    bundle = shutil.copytree(exported, tmp_path_factory.mktemp("page") / "home" / "bundle")
    with serving(bundle) as (_, url):
        state = json.loads((bundle.parent / "server.json").read_text())
        yield Served(url, f"127.0.0.1:{state['http_port']}", f"127.0.0.1:{state['metrics_port']}")


def run(line: list[str], *, folder: Path) -> str:
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        line, cwd=folder, capture_output=True, text=True, check=False, env=environment, timeout=WAIT_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write_scripts(folder: Path, served: Served) -> None:
    for file, text in (("pack.py", PACK), ("grpc_example.py", GRPC)):
        (folder / file).write_text(at(text, served))


def at(text: str, served: Served) -> str:
    """With the server's addresses, and time for a busy machine."""
    text = text.replace("127.0.0.1:8000", served.http).replace("127.0.0.1:8001", served.url)
    return re.sub(r"(--max-time |deadline_s=|client_timeout=)0\.\d", r"\g<1>60", text)


@pytest.mark.triton
def test_the_clients_example(tiny_served: Served, tmp_path: Path) -> None:
    (tmp_path / "client.py").write_text(at(CLIENT, tiny_served) + "\n\nimport asyncio\n\nasyncio.run(main())\n")
    printed = run([sys.executable, "client.py"], folder=tmp_path)
    numbers = [float(text) for text in re.findall(r"\d\.\d+", printed)]
    assert len(numbers) == 2 + 3 * 2 + 2
    assert numbers[:2] == numbers[-2:]


@pytest.mark.triton
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("name", ["tiny", "lists"])
def test_plain_http_and_plain_grpc_score_as_offline(
    name: str, exported: Path, lists_bundle: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    served: Served = request.getfixturevalue(f"{name}_served")
    golden = (exported if name == "tiny" else lists_bundle) / "golden"
    write_scripts(tmp_path, served)
    lines = (golden / "requests.jsonl").read_text().splitlines()[:32]
    kept = pq.read_table(golden / "scores.parquet").slice(0, 32)
    wanted = np.stack([kept[task].to_numpy() for task in kept.column_names if task != "ids"], axis=1)
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    answer = json.loads(run(["bash", "-ec", at(ROWS, served)], folder=tmp_path))
    (output,) = answer["outputs"]
    assert output["name"] == "score"
    np.testing.assert_allclose(np.reshape(output["data"], output["shape"]), wanted, rtol=0, atol=1e-6)
    printed = json.loads(run([sys.executable, "grpc_example.py", served.url], folder=tmp_path))
    np.testing.assert_allclose(printed, wanted, rtol=0, atol=1e-6)


@pytest.mark.triton
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_plain_http_and_plain_grpc_rank_as_the_client(lists_served: Served, lists_bundle: Path, tmp_path: Path) -> None:
    write_scripts(tmp_path, lists_served)
    rows = [json.loads(line) for line in (lists_bundle / "golden" / "requests.jsonl").read_text().splitlines()[:9]]
    parts = (read_bundle(lists_bundle).serve.user, set(rows[0]) - set(read_bundle(lists_bundle).serve.user))
    user, items = ([{name: row[name] for name in part} for row in rows] for part in parts)
    (tmp_path / "ranking.jsonl").write_text("\n".join(json.dumps(row) for row in [user[0], *items]))
    with Client(lists_served.url, deadline_s=WAIT_S) as client:
        wanted = client.rank(user[0], items).score
    answer = json.loads(run(["bash", "-ec", at(RANKING, lists_served)], folder=tmp_path))
    (output,) = answer["outputs"]
    assert (output["name"], output["shape"]) == ("rank_score", [1, *wanted.shape])
    np.testing.assert_allclose(np.reshape(output["data"], wanted.shape), wanted, rtol=0, atol=1e-6)
    (printed,) = json.loads(run([sys.executable, "grpc_example.py", lists_served.url], folder=tmp_path))
    np.testing.assert_allclose(printed, wanted, rtol=0, atol=1e-6)
    assert len({tuple(scores) for scores in printed}) > 1


def test_the_page_names_every_metric_and_setting() -> None:
    from deploy.exporter import COUNTERS, GAUGES
    from recsys.experiment import Serve

    short = {
        name.replace("rankforge_score_count", "_count").replace("rankforge_score_sum", "_sum") for name in COUNTERS
    }
    assert [name for name in (short | set(GAUGES)) if f"`{name}`" not in PAGE] == []
    own = {"user", "max_candidates", "numbers", "max_batch_size", "psi_alarm"}
    assert own <= set(Serve.model_fields)
    assert [name for name in own if f"| `{name}` |" not in PAGE] == []
