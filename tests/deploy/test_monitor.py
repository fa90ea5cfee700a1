"""What is counted is what was there, and the drift index is that of the ETL's report."""

from typing import Any

import numpy as np
import pytest

import etl.profile
import etl.transform
from deploy.monitor import SCORE_EDGES, Monitor, Window, binned, psi
from etl.lookup import Vocabulary
from etl.transform import MISSING_KEY, MISSING_NUMBER, NO_KEY, Packed, Transform

STATE: dict[str, Any] = {
    "signature": {
        "columns": {"item": "int64", "tags": "list<int64>", "price": "float64", "size": "float64"},
        "keys": ["item", "tags"],
        "numbers": ["price", "size"],
        "slots": {"tags": 2},
        "newest": [],
    },
    "features": [
        {"name": "item", "table": "item", "column": "item", "weights": None, "kind": "vocabulary"},
        {"name": "tags", "table": "item", "column": "tags", "weights": None, "kind": "vocabulary"},
        {"name": "size", "kind": "field", "table": "size", "column": "size", "fill": 0.0, "clip": None, "log1p": False}
        | {"mean": 0.0, "std": 1.0},
    ],
    "dense": [
        {"name": "price", "column": "price", "fill": 0.0, "clip": [0.0, 9.0], "log1p": False, "mean": 0.0, "std": 1.0}
    ],
}


@pytest.fixture
def transform() -> Transform:
    return Transform(STATE, {"item": Vocabulary(np.array([5, 6]), np.array([1, 2]))})


def monitor(reference: dict[str, Any] | None = None, *, tasks: tuple[str, ...] = ("click",)) -> Monitor:
    return Monitor(
        reference or {"scores": {}, "features": {}, "numbers": {}}, tasks=tasks, missing_number=MISSING_NUMBER
    )


def values(found: Monitor) -> dict[tuple[str, str], float]:
    """Feature and kind -> count."""
    taken = found.take()
    return {(dict(labels)["feature"], dict(labels)["kind"]): n for (name, labels), n in taken.items() if labels and n}


def test_known_missing_unseen_and_clipped_values(transform: Transform) -> None:
    keys = np.array([[5, 6, NO_KEY], [MISSING_KEY, 7, 8], [9, NO_KEY, NO_KEY]])
    numbers = np.array([[1.0, 1.0], [-2.0, MISSING_NUMBER], [MISSING_NUMBER, 3.0]])
    packed, found = Packed(keys, numbers), monitor()
    for _ in range(2):
        found.seen(transform, packed=packed, encoded=transform.apply(packed))
    once = {
        ("item", "known"): 1, ("item", "missing"): 1, ("item", "unseen"): 1,
        ("tags", "known"): 1, ("tags", "unseen"): 2,
        ("size", "known"): 2, ("size", "missing"): 1,
        ("price", "known"): 1, ("price", "missing"): 1, ("price", "clipped"): 1,
    }  # fmt: skip
    assert values(found) == {key: 2 * count for key, count in once.items()}
    assert values(found) == {}


def test_features_to_skip_are_not_counted(transform: Transform) -> None:
    packed, found = Packed(np.full((2, 3), 5), np.zeros((2, 2))), monitor()
    found.seen(transform, packed=packed, encoded=transform.apply(packed), skip=frozenset({"item", "size"}))
    assert {name for name, _ in values(found)} == {"tags", "price"}


def test_scores_are_counted_at_and_below_each_edge() -> None:
    found = monitor(tasks=("click", "buy"))
    found.scored(np.array([[0.1, 0.9999], [0.1000001, 0.0]], np.float32))
    found.scored(np.array([[1.0, 0.5]], np.float32))
    taken = found.take()
    buckets = {
        (dict(labels)["task"], dict(labels)["le"]): n for (m, labels), n in taken.items() if m.endswith("_bucket")
    }
    assert (buckets["click", "0.05"], buckets["click", "0.1"], buckets["click", "0.2"]) == (0, 1, 2)
    assert (buckets["click", "0.99"], buckets["click", "1.0"], buckets["click", "+Inf"]) == (2, 3, 3)
    assert (buckets["buy", "0.001"], buckets["buy", "0.99"], buckets["buy", "1.0"]) == (1, 2, 3)
    assert taken["rankforge_rows_total", ()] == 3
    assert taken["rankforge_score_sum", (("task", "click"),)] == pytest.approx(1.2)
    assert list(SCORE_EDGES) == sorted(SCORE_EDGES)


@pytest.mark.parametrize(("p", "q"), [([10, 20, 30], [30, 20, 10]), ([0, 5, 900], [7, 0, 3]), ([4], [9])])
def test_the_index_is_that_of_the_etl(p: list[int], q: list[int]) -> None:
    assert psi(p, q) == pytest.approx(etl.profile.psi(p, q))


def test_scores_that_move_raise_the_index_and_those_of_training_do_not() -> None:
    rng = np.random.default_rng(1)
    training = rng.beta(2, 5, 20_000).astype(np.float32)
    edges = np.quantile(training, np.arange(1, 10) / 10).tolist()
    reference = {
        "scores": {"click": {"edges": edges, "counts": binned(training, edges).tolist()}},
        "features": {},
        "numbers": {},
    }
    found = monitor(reference)
    found.scored(rng.beta(2, 5, (900, 1)).astype(np.float32))
    found.take()
    assert found.drift() == {}, "too few to tell"
    found.scored(rng.beta(2, 5, (9000, 1)).astype(np.float32))
    found.take()
    assert found.drift()["score", "click"] < 0.02
    for _ in range(3):
        found.scored(rng.beta(4, 4, (9000, 1)).astype(np.float32))
        found.take()
    assert found.drift()["score", "click"] > 0.5


def test_unseen_ids_raise_the_index(transform: Transform) -> None:
    found = monitor({"scores": {}, "features": {"item": [980, 10, 10]}, "numbers": {}})
    for keys, low, high in ((np.full((2000, 3), 5), 0.0, 0.1), (np.full((2000, 3), 99), 1.0, 10.0)):
        packed = Packed(keys, np.zeros((2000, 2)))
        found.seen(transform, packed=packed, encoded=transform.apply(packed))
        found.take()
        assert low < found.drift()["values", "item"] < high


@pytest.mark.parametrize("name", ["price", "size"])  # a dense input, and a field behind the floats of the dense ones
def test_numbers_that_move_raise_the_index(transform: Transform, name: str) -> None:
    rng = np.random.default_rng(1)
    of_training = rng.exponential(2.0, 20_000).astype(np.float32)
    edges = np.quantile(of_training, np.arange(1, 10) / 10).tolist()
    bins = {"edges": edges, "counts": binned(of_training, edges).tolist()}
    found = monitor({"scores": {}, "features": {}, "numbers": {name: bins}})
    for scale, low, high in ((2.0, 0.0, 0.05), (5.0, 0.2, 2.0)):
        for _ in range(30):
            packed = Packed(np.full((700, 3), 5), rng.exponential(scale, (700, 2)))
            found.seen(transform, packed=packed, encoded=transform.apply(packed))
            found.take()
        assert low < found.drift()["numbers", name] < high


def test_numbers_of_a_busy_server_are_a_sample(transform: Transform) -> None:
    found = monitor({"scores": {}, "features": {}, "numbers": {"price": {"edges": [1.0], "counts": [10, 10]}}})
    packed = Packed(np.full((1000, 3), 5), np.zeros((1000, 2)))
    for _ in range(5):
        found.seen(transform, packed=packed, encoded=transform.apply(packed))
    assert values(found)["price", "known"] == 5000
    assert found._windows["numbers", "price"].counts.tolist() == [1024, 0]


def test_a_window_forgets() -> None:
    window = Window(2)
    for _ in range(40):
        window.add(np.array([1000, 0]))
    for _ in range(20):
        window.add(np.array([0, 1000]))
    assert window.counts[0] == 0
    assert 10_000 <= window.counts[1] < 20_000
