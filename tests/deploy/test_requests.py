"""Requests of both kinds to a real server: each answered as if alone, the bad ones by name, and all of them counted."""

import asyncio
import json
import os
import re
import shutil
import signal
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import tritonclient.grpc as triton_grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from deploy.bundle import Signature, read_bundle
from deploy.client import AsyncClient, Client
from deploy.offline import offline_run, offline_scores
from deploy.wire import Wire
from etl.faults import Fault
from etl.pack import pack
from etl.transform import MISSING_NUMBER, NO_KEY
from etl.transform import Signature as Packing
from tests.deploy.conftest import Served, raw_lists
from tests.deploy.test_serving import WAIT_S, serving

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # the commands silence it themselves
Arrays = dict[str, npt.NDArray[Any]]
USER = ("history", "tags", "tag_weights")


@dataclass(frozen=True)
class Good:
    """A sound request and its offline scores [B, 1]."""

    arrays: Arrays
    score: npt.NDArray[np.float32]


def set_to(name: str, place: tuple[int, ...], value: float) -> Callable[[Arrays], Arrays]:
    def change(arrays: Arrays) -> Arrays:
        array = arrays[name].copy()
        array[place] = value
        return arrays | {name: array}

    return change


def replaced(name: str, by: Callable[[npt.NDArray[Any]], npt.NDArray[Any] | None]) -> Callable[[Arrays], Arrays]:
    def change(arrays: Arrays) -> Arrays:
        made = by(arrays[name])
        return {key: array for key, array in (arrays | {name: made}).items() if array is not None}

    return change


def gap(arrays: Arrays) -> Arrays:
    keys = arrays["keys"].copy()
    keys[0, 1:5] = [3, NO_KEY, 3, NO_KEY]
    return arrays | {"keys": keys}


def weight_alone(arrays: Arrays) -> Arrays:
    keys, numbers = arrays["keys"].copy(), arrays["numbers"].copy()
    keys[0, 5:], numbers[0, 1:] = NO_KEY, [1.0, MISSING_NUMBER, MISSING_NUMBER]
    return {"keys": keys, "numbers": numbers}


# What a foreign client may send, by kind of request: how a sound one is spoilt, and what the answer has to name.
# keys: item, history x 4, tags x 3; numbers: price, tag_weights x 3.
BAD_ROWS: dict[str, tuple[Callable[[Arrays], Arrays], str]] = {
    "NaN": (set_to("numbers", (0, 0), np.nan), "column 'price' holds nan at row 0"),
    "infinity": (set_to("numbers", (0, 0), np.inf), "column 'price' holds inf"),
    "minus infinity": (set_to("numbers", (0, 0), -np.inf), "column 'price' holds -inf"),
    "beyond float32": (set_to("numbers", (0, 0), 1e300), "feature 'price:value' leaves the range of float32"),
    "NaN as a weight": (set_to("numbers", (0, 1), np.nan), "column 'tag_weights' holds nan"),
    "weight without id": (weight_alone, "columns 'tags' and 'tag_weights' have lists of different lengths"),
    "filler as an id": (set_to("keys", (0, 0), NO_KEY), "column 'item' holds -9223372036854775807"),
    "gap in a list": (gap, "column 'history' has a value behind an unused place"),
    "too short": (replaced("keys", lambda keys: keys[:, :7]), "'keys'"),
    "too long": (replaced("keys", lambda keys: np.repeat(keys, 2, axis=1)), "'keys'"),
    "another type": (replaced("keys", lambda keys: keys.astype(np.int32)), "'keys'"),
    "an input missing": (replaced("numbers", lambda _: None), "input 'numbers' is missing, with the columns price"),
    "uneven": (replaced("numbers", lambda numbers: np.repeat(numbers, 2, axis=0)), "batch size does not match other"),
    "too many rows": (lambda arrays: {n: np.repeat(a[:1], 33, axis=0) for n, a in arrays.items()}, "batch-size"),
    "an unknown input": (lambda arrays: arrays | {"nambers": arrays["numbers"]}, "'nambers'"),
}
BAD_RANKINGS: dict[str, tuple[Callable[[Arrays], Arrays], str]] = {
    "NaN of a candidate": (set_to("item_numbers", (0, 0, 0), np.nan), "column 'price' holds nan at row 0"),
    "NaN of the user": (set_to("user_numbers", (0, 0), np.nan), "column 'tag_weights' holds nan"),
    "filler as a candidate": (set_to("item_keys", (0, 0, 0), NO_KEY), "column 'item' holds -9223372036854775807"),
    "no user": (replaced("user_keys", lambda _: None), "input 'user_keys' is missing, with the columns history, tags"),
    "no candidates' keys": (
        replaced("item_keys", lambda _: None),
        "input 'item_keys' is missing, with the columns item",
    ),
    "too many candidates": (
        lambda arrays: arrays | {n: np.repeat(arrays[n][:, :1], 1025, axis=1) for n in ("item_keys", "item_numbers")},
        "hold 1025 candidates, at most 1024",
    ),
    "two users": (lambda arrays: {n: np.repeat(a, 2, axis=0) for n, a in arrays.items()}, "'user_keys' has 2 rows"),
    "uneven candidates": (replaced("item_numbers", lambda numbers: np.repeat(numbers, 2, axis=1)), "'item_numbers'"),
    "rows beside a ranking": (
        lambda arrays: arrays | {"keys": np.zeros((1, 8), np.int64)},
        "input 'keys' is one of rows",
    ),
}


@pytest.fixture(scope="module")
def good(lists_bundle: Path) -> tuple[list[Good], list[Good]]:
    """Forty requests of rows, 1 to 8 each, and forty rankings of 1 to 40 candidates; all users' histories differ."""
    network, transform = offline_run(lists_bundle.parent / "run")
    bundle = read_bundle(lists_bundle)
    user, items = bundle.signature.part(USER), bundle.signature.part(("item", "price"))
    rng = np.random.default_rng(1)
    rows, rankings = [], []
    for seed in range(40):
        table = raw_lists(int(rng.integers(1, 9)), seed=100 + seed).drop_columns(["click"])
        score = offline_scores(network, transform, table=table).score
        rows.append(Good(packed("", table, bundle.signature), score))
        table = raw_lists(int(rng.integers(1, 41)), seed=200 + seed).drop_columns(["click"])
        table = whole(table)
        arrays = packed("user_", table.slice(0, 1), user) | packed("item_", table, items)
        arrays = {name: array[None] if name.startswith("item_") else array for name, array in arrays.items()}
        rankings.append(Good(arrays, offline_scores(network, transform, table=table).score))
    return rows, rankings


def whole(table: pa.Table) -> pa.Table:
    """All rows with the user of the first."""
    first = table.slice(0, 1)
    return pa.table(
        {
            name: pa.concat_arrays([first[name].combine_chunks()] * len(table)) if name in USER else table[name]
            for name in table.column_names
        }
    )


def packed(prefix: str, table: pa.Table, signature: Signature) -> Arrays:
    packing = Packing.from_json(json.loads(signature.model_dump_json()))
    found = pack(table.select(list(packing.columns)), packing)
    arrays = {f"{prefix}keys": found.keys, f"{prefix}numbers": found.numbers}
    return {name: np.ascontiguousarray(array) for name, array in arrays.items() if array.shape[1]}


def send(server: triton_grpc.InferenceServerClient, arrays: Arrays, *, free: threading.Semaphore) -> "Future[Any]":
    future: Future[Any] = Future()

    def done(result: Any, error: InferenceServerException | None) -> None:
        free.release()
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    inputs = []
    for name, array in arrays.items():
        tensor = triton_grpc.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(np.ascontiguousarray(array))
        inputs.append(tensor)
    output = triton_grpc.InferRequestedOutput("score" if "keys" in arrays else "rank_score")
    free.acquire()
    server.async_infer("ranker", inputs, callback=done, outputs=[output])
    return future


@pytest.mark.triton
@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_tenth_of_bad_requests_fails_alone_and_by_name(
    lists_served: Served, good: tuple[list[Good], list[Good]], count: int
) -> None:
    rng = np.random.default_rng(count)
    bad = [(0, kind, *case) for kind, case in BAD_ROWS.items()] + [
        (1, kind, *case) for kind, case in BAD_RANKINGS.items()
    ]
    server, free = triton_grpc.InferenceServerClient(lists_served.url), threading.Semaphore(32)
    sent: list[tuple[Future[Any], Good | tuple[str, str]]] = []
    for at in range(count):
        if at % 10 == 5:
            which, kind, spoil, named = bad[at // 10 % len(bad)]
            request = good[which][int(rng.integers(40))]
            sent.append((send(server, spoil(request.arrays), free=free), (kind, named)))
        else:
            request = good[int(rng.integers(2))][int(rng.integers(40))]
            sent.append((send(server, request.arrays, free=free), request))
    refused: Counter[str] = Counter()
    for future, expected in sent:
        error = future.exception(WAIT_S)
        if isinstance(expected, Good):
            assert error is None
            got = future.result().as_numpy("score" if "keys" in expected.arrays else "rank_score")
            np.testing.assert_allclose(got.reshape(-1, 1), expected.score, rtol=0, atol=1e-6)
        else:
            kind, named = expected
            assert isinstance(error, InferenceServerException), kind
            assert str(error.status()).endswith("INVALID_ARGUMENT"), f"{kind}: {error}"
            assert named in str(error), kind
            refused[kind] += 1
    server.close()
    assert set(refused) == set(BAD_ROWS) | set(BAD_RANKINGS)
    assert sum(refused.values()) == count // 10


@pytest.mark.triton
def test_rankings_of_any_size_are_scored_together(lists_served: Served, good: tuple[list[Good], list[Good]]) -> None:
    """One to forty candidates, histories and bags of any length: what has queued up is one batch of Triton's."""
    server, free = triton_grpc.InferenceServerClient(lists_served.url), threading.Semaphore(40)
    before, rounds = batches(lists_served), 20
    for _ in range(rounds):
        sent = [(send(server, each.arrays, free=free), each) for each in good[1]]
        for future, each in sent:
            got = future.result(WAIT_S).as_numpy("rank_score")
            np.testing.assert_allclose(got.reshape(-1, 1), each.score, rtol=0, atol=1e-6)
    server.close()
    assert rounds < batches(lists_served) - before < rounds * 40


def batches(served: Served) -> float:
    """That the model has executed, by Triton's own count."""
    with urllib.request.urlopen(f"http://{served.metrics}/metrics", timeout=WAIT_S) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("nv_inference_exec_count{"))


def metrics(served: Served) -> dict[str, float]:
    """Series -> value, of ours."""
    with urllib.request.urlopen(f"http://{served.metrics}/metrics", timeout=WAIT_S) as answer:
        lines = answer.read().decode().splitlines()
    return {
        name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line.startswith("rankforge"))
    }


def series(found: Mapping[str, float], name: str, **labels: str) -> float:
    """The one series of this name with these labels; 0 where there is none yet."""
    wanted = {f'{key}="{value}"' for key, value in labels.items()}
    values = [value for key, value in found.items() if key.startswith(f"{name}{{") and wanted <= set(labels_of(key))]
    assert len(values) <= 1, values
    return sum(values)


def labels_of(key: str) -> list[str]:
    return re.findall(r'[a-z_]+="[^"]*"', key)


def settled(served: Served, *, rows: float) -> dict[str, float]:
    """The metrics once they show so many rows."""
    for _ in range(100):
        found = metrics(served)
        if series(found, "rankforge_rows_total") >= rows:
            return found
        threading.Event().wait(0.1)
    raise AssertionError(f"{found} after ten seconds, wanted {rows} rows")


@pytest.mark.triton
def test_values_and_scores_are_counted_and_drift_alarms(lists_served: Served) -> None:
    threading.Event().wait(3)  # what other tests sent is handed over
    before = settled(lists_served, rows=0)
    start = series(before, "rankforge_rows_total")
    row: dict[str, object] = {"item": 7, "history": [1, 999], "tags": ["a", None], "tag_weights": [1.0, 0.5]}
    with Client(lists_served.url) as client:
        client.score([row | {"price": None}] * 5)
        client.rank({name: row[name] for name in USER}, [{"item": item, "price": 0.5} for item in (1, 999, None)])
        with pytest.raises(Fault, match="float32"):
            client.score([row | {"price": 1e300}])
    after = settled(lists_served, rows=start + 8)

    def gained(name: str, **labels: str) -> float:
        return series(after, name, **labels) - series(before, name, **labels)

    assert gained("rankforge_rows_total") == 8
    assert gained("rankforge_refused_requests_total") == 1
    seen = {
        (name, kind): gained("rankforge_values_total", feature=name, kind=kind)
        for name in ("item", "history", "tags", "price")
        for kind in ("known", "missing", "unseen")
    }
    assert [seen["item", kind] for kind in ("known", "unseen", "missing")] == [7, 1, 1]
    assert (seen["history", "known"], seen["history", "unseen"]) == (7, 7), "a user's once, refused rows too"
    assert (seen["tags", "known"], seen["tags", "missing"]) == (7, 7)
    assert (seen["price", "missing"], seen["price", "known"]) == (5, 4)
    assert gained("rankforge_score_count", task="click") == 8
    assert gained("rankforge_score_bucket", task="click", le="+Inf") == 8
    assert not [value for name, value in before.items() if "drift_alarm" in name and 'name="item"' in name and value]
    with Client(lists_served.url) as client:
        for _ in range(300):  # both instances get their share
            client.score([row | {"item": 999, "price": 0.5}] * 32)
    found = settled(lists_served, rows=start + 8 + 300 * 32)
    assert [value for name, value in found.items() if "drift_alarm" in name and 'of="values"' in name and value]
    assert [value for name, value in found.items() if "drift_psi" in name and 'of="values"' in name and value > 0.2]


@pytest.mark.triton
def test_nan_is_missing_as_in_the_files_of_training(lists_served: Served, lists_bundle: Path) -> None:
    table = raw_lists(3, seed=8).drop_columns(["click"])
    given = table.set_column(table.column_names.index("price"), "price", pa.array([np.nan, 0.5, np.nan]))
    null = table.set_column(table.column_names.index("price"), "price", pa.array([None, 0.5, None]))
    network, transform = offline_run(lists_bundle.parent / "run")
    with Client(lists_served.url) as client:
        score_BT = client.score(given).score
        np.testing.assert_array_equal(score_BT, client.score(null).score)
        np.testing.assert_array_equal(score_BT, client.score(given.to_pylist()).score)
    np.testing.assert_allclose(score_BT, offline_scores(network, transform, table=given).score, rtol=0, atol=1e-6)


@pytest.mark.triton
def test_more_candidates_than_the_server_takes_come_back_in_order(lists_served: Served) -> None:
    table = raw_lists(2500, seed=9).drop_columns(["click"])
    user = {name: table[name][0].as_py() for name in USER}
    with Client(lists_served.url) as client:
        ranked = client.rank(user, table.select(["item", "price"]), ids=True)
        rows = client.score(whole(table), ids=True)
        assert client.rank(user, []).score.shape == (0, 1)
    np.testing.assert_array_equal(ranked.ids, rows.ids)
    np.testing.assert_allclose(ranked.score, rows.score, rtol=0, atol=1e-6)


@pytest.mark.triton
def test_asyncio_answers_as_the_blocking_client(lists_served: Served) -> None:
    tables = [raw_lists(count, seed=count).drop_columns(["click"]) for count in range(1, 100)]
    user = {name: tables[5][name][0].as_py() for name in USER}
    with Client(lists_served.url) as client:
        wanted = [client.score(table).score for table in tables]
        ranked = client.rank(user, tables[50].select(["item", "price"])).score

    async def all_at_once() -> list[Any]:
        async with AsyncClient(lists_served.url) as client:
            assert (client.tasks, list(client.columns)) == (("click",), ["item", *USER, "price"])
            with pytest.raises(Fault, match="column 'price' holds string, wanted float64"):
                await client.score([tables[0].to_pylist()[0] | {"price": "dear"}])
            with pytest.raises(Fault, match="leaves the range of float32"):
                await client.score([tables[0].to_pylist()[0] | {"price": 1e300}])
            answers = await asyncio.gather(*(client.score(table) for table in tables))
            return [*answers, await client.rank(user, tables[50].select(["item", "price"]))]

    *scores, last = asyncio.run(all_at_once())
    for one, other in zip(scores, wanted, strict=True):
        np.testing.assert_allclose(one.score, other, rtol=0, atol=1e-6)
    np.testing.assert_allclose(last.score, ranked, rtol=0, atol=1e-6)


@pytest.mark.triton
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"price": "dear"}, "column 'price' holds string, wanted float64"),
        ({"item": 2**70}, "column 'item': "),
        ({"item": 1.5}, "column 'item' holds double, wanted int64"),
        ({"history": [1, "x"]}, "column 'history': "),
        ({"colour": "red"}, "unknown column 'colour'"),
        ({"tags": ["a"] * 4, "tag_weights": [1.0] * 4}, "column 'tags' holds 4 values at row 0, at most 3"),
        ({"price": float("inf")}, "column 'price' holds inf"),
    ],
)
def test_the_clients_fault_names_the_column(lists_served: Served, change: dict[str, object], message: str) -> None:
    row = raw_lists(1, seed=1).drop_columns(["click"]).to_pylist()[0] | change
    user = {name: value for name, value in row.items() if name in USER}
    item = {name: value for name, value in row.items() if name not in USER}
    with Client(lists_served.url) as client:
        for call in (lambda: client.score([row]), lambda: client.rank(user, [item])):
            with pytest.raises(Fault) as caught:
                call()
            assert message in str(caught.value)


@pytest.mark.triton
def test_a_deadline_that_passes_is_a_fault(lists_served: Served) -> None:
    table = raw_lists(32, seed=1).drop_columns(["click"])
    with Client(lists_served.url) as client:
        client._deadline_s = 1e-4
        with pytest.raises(Fault, match="got no answer; wanted an answer within"):
            client.score(table)


@pytest.mark.triton
def test_a_killed_server_costs_no_request(lists_bundle: Path, tmp_path: Path) -> None:
    """The supervisor starts it again; until then the client tries."""
    bundle = shutil.copytree(lists_bundle, tmp_path / "home" / "bundle")
    table = raw_lists(8, seed=1).drop_columns(["click"])
    with serving(bundle) as (_, url), Client(url, deadline_s=60.0) as client:
        wanted = client.score(table).score
        os.kill(json.loads((bundle.parent / "server.json").read_text())["pid"], signal.SIGKILL)
        for _ in range(20):
            np.testing.assert_allclose(client.score(table).score, wanted, rtol=0, atol=1e-6)


def test_a_model_of_rows_alone_does_not_rank(lists_bundle: Path) -> None:
    described = read_bundle(lists_bundle).signature.model_dump(mode="json") | {"tasks": ["click"], "max_rows": 32}
    wire = Wire(json.dumps(described), place="here", deadline_s=1.0)
    with pytest.raises(Fault, match=r"name the user's columns in \[serve\] user"):
        next(wire.ranked({}, [], ids=False))


def test_numbers_of_32_bits_are_packed_where_the_model_takes_them() -> None:
    """What float32 would round is refused: it could fall into another bucket than offline."""
    described = {
        "columns": {"x": "float64", "y": "float64"},
        **{"keys": [], "numbers": ["x", "y"], "slots": {}, "newest": []},
        **{"tasks": ["click"], "max_rows": 32, "numbers_type": "FP32"},
    }
    wire = Wire(json.dumps(described), place="here", deadline_s=1.0)
    (message,) = wire.rows([{"x": 0.5, "y": None}, {"x": 2**24, "y": 7.0}], ids=False)
    (numbers,) = message.inputs
    assert (numbers.datatype(), numbers.shape()) == ("FP32", [2, 2])
    sent = np.frombuffer(numbers._get_content(), np.float32)
    assert sent.tolist() == [0.5, np.finfo(np.float32).min, 2**24, 7.0]
    for value, shown in ((0.1, "0.1"), (2**24 + 1, "16777217.0"), (1e300, "1e+300"), (-3.4e38, "-3.4e+38")):
        with pytest.raises(Fault, match=re.escape(f"column 'y' holds {shown} at row 1, which is no float32")):
            list(wire.rows([{"x": 0.5, "y": 1.0}, {"x": 0.5, "y": value}], ids=False))


@pytest.mark.triton
def test_a_model_that_takes_numbers_of_32_bits(bundle: Path) -> None:
    """Rows, and rankings, as offline; the manifest is the one file without a hash."""
    described = json.loads((bundle / "bundle.json").read_text())
    described["serve"]["numbers"] = "fp32"
    (bundle / "bundle.json").write_text(json.dumps(described))
    columns = {"site": ["a"] * 3, "city": ["Berlin", None, "x"], "item": [1, 2, None], "age": [20.0] * 3}
    table = pa.table(columns | {"price": [0.5, None, 2.25]})
    network, transform = offline_run(Path(described["run"]))
    wanted = offline_scores(network, transform, table=table)
    with serving(bundle) as (_, url), Client(url) as client:
        user, items = {"site": "a", "age": 20.0}, table.drop_columns(["site", "age"])
        for got in (client.score(table, ids=True), client.rank(user, items, ids=True)):
            np.testing.assert_allclose(got.score, wanted.score, rtol=0, atol=1e-6)
            np.testing.assert_array_equal(got.ids, wanted.ids)
