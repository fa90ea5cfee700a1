"""A ranking request scores as the rows that it stands for, and only its own faults touch it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import deploy.ranker
import etl.transform
from deploy.bundle import read_bundle
from deploy.ranker import Ranker, Request, Scored
from deploy.ranking import Ranked, Ranking, RankRequest
from deploy.served_program import Program, load_program
from etl.lookup import write_slots
from etl.pack import pack
from etl.transform import MISSING_NUMBER, Packed, Signature, crossed
from tests.deploy.conftest import raw_lists
from tests.deploy.test_publish import reseal

Seen = list[tuple[list[str], int]]


class Case:
    """A bundle's ranker, its ranking of at most 50 candidates in forwards of 16 rows, and what both told of."""

    def __init__(self, bundle: Path) -> None:
        described = read_bundle(bundle)
        self.seen: Seen = []
        self.ranker = Ranker(bundle, etl.transform, program=load_program(bundle), seen=self._note)
        self.signature = Signature.from_json(described.signature.model_dump(mode="json"))
        user = described.signature.part(described.serve.user)
        items = described.signature.part(set(described.signature.columns) - set(described.serve.user))
        self.user, self.items = (Signature.from_json(part.model_dump(mode="json")) for part in (user, items))
        parts: dict[str, Any] = {"user": self.user.as_json(), "items": self.items.as_json()}
        self.ranking = Ranking(self.ranker, deploy.ranker, **parts, most=50, rows=16)

    def _note(self, transform: Any, *, packed: Packed, encoded: Any, skip: frozenset[str] = frozenset()) -> None:
        self.seen.append(([step["name"] for step in transform.features if step["name"] not in skip], len(packed.keys)))

    def request(self, rows: pa.Table) -> tuple[RankRequest, Request]:
        """The candidates of these rows for the user of the first one, and the rows that they stand for."""
        first = rows.slice(0, 1)
        user, items = pack(first.select(list(self.user.columns)), self.user), self._pack(rows, self.items)
        whole = {
            name: pa.concat_arrays([first[name].combine_chunks()] * len(rows))
            if name in self.user.columns
            else rows[name]
            for name in self.signature.columns
        }
        packed = self._pack(pa.table(whole), self.signature)
        ranked = RankRequest(Request(user.keys, user.numbers), Request(items.keys, items.numbers))
        return ranked, Request(packed.keys, packed.numbers)

    def score(self, rows: Request) -> list[Scored]:
        """Forwards of 16 rows."""
        parts = [slice(at, at + 16) for at in range(0, len(rows.keys), 16)]
        scored = [self.ranker.score([Request(rows.keys[part], rows.numbers[part])])[0] for part in parts]
        return [each for each in scored if isinstance(each, Scored)]

    def _pack(self, rows: pa.Table, signature: Signature) -> Packed:
        return pack(rows.select(list(signature.columns)), signature)


def tiny_rows(rows: int, *, seed: int) -> pa.Table:
    rng = np.random.default_rng(seed)
    return pa.table(
        {
            "site": rng.choice([*"abcdez"], rows),
            "city": rng.choice(["Berlin", "Kraków", "", "x"], rows),
            "item": rng.integers(0, 40, rows),
            "age": pa.array([None if rng.random() < 0.1 else float(rng.integers(10, 90)) for _ in range(rows)]),
            "price": rng.uniform(0, 50, rows),
        }
    )


@pytest.fixture(scope="module")
def tiny(exported: Path) -> Case:
    """Its user is a text and a number, which is bucketed too, and a cross reads the text and a candidate's city."""
    return Case(exported)


@pytest.fixture(scope="module")
def lists(lists_bundle: Path) -> Case:
    """Its user is a history and a weighted bag."""
    return Case(lists_bundle)


@pytest.mark.parametrize("name", ["tiny", "lists"])
def test_mixed_requests_score_as_their_rows(name: str, request: pytest.FixtureRequest) -> None:
    case: Case = request.getfixturevalue(name)
    rows = tiny_rows if name == "tiny" else raw_lists
    pairs = [case.request(rows(count, seed=count)) for count in (5, 1, 50, 17, 3, 50, 50)]
    wanted = [case.score(plain) for _, plain in pairs]
    got = case.ranking.score([ranked for ranked, _ in pairs])
    for one, other in zip(got, wanted, strict=True):
        assert isinstance(one, Ranked)
        for name in ("ids", "floats"):
            np.testing.assert_array_equal(getattr(one, name), np.concatenate([getattr(each, name) for each in other]))
        np.testing.assert_allclose(one.score, np.concatenate([each.score for each in other]), rtol=0, atol=1e-6)
    assert np.ptp(np.concatenate([one.score for one in got])) > 1e-3


def test_a_users_values_are_transformed_once(tiny: Case) -> None:
    requests = [tiny.request(tiny_rows(count, seed=count))[0] for count in (5, 30)]
    tiny.seen.clear()
    tiny.ranking.score(requests)
    assert tiny.seen == [(["site", "age_bucket"], 2), (["city", "item", "site_x_city"], 35)]


def spoilt(request: RankRequest, *, half: str, name: str, value: float) -> RankRequest:
    """With the last row of one matrix at `value` in its first column."""
    parts = {side: getattr(request, side) for side in ("user", "items")}
    arrays = {matrix: getattr(parts[half], matrix).copy() for matrix in ("keys", "numbers")}
    arrays[name][-1, 0] = value
    return RankRequest(**(parts | {half: Request(**arrays)}))


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(
    ("half", "name", "value", "message"),
    [
        ("user", "numbers", np.nan, "column 'age' holds nan at row 0"),
        ("items", "numbers", np.inf, "column 'price' holds inf at row 3"),
        ("items", "numbers", 1e300, "feature 'price' leaves the range of float32 at row 3"),
        ("user", "keys", etl.transform.NO_KEY, "column 'site' holds -9223372036854775807"),
        ("items", "keys", etl.transform.NO_KEY, "column 'city' holds -9223372036854775807 at row 3"),
    ],
)
def test_a_bad_value_is_its_own_requests_fault(
    tiny: Case, place: int, half: str, name: str, value: float, message: str
) -> None:
    requests = [tiny.request(tiny_rows(4, seed=seed))[0] for seed in range(3)]
    alone = [tiny.ranking.score([each])[0] for each in requests]
    requests[place] = spoilt(requests[place], half=half, name=name, value=value)
    results = tiny.ranking.score(requests)
    assert message in str(results[place])
    for at in {0, 1, 2} - {place}:
        np.testing.assert_allclose(results[at].score, alone[at].score, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("table", "known", "row"), [("site", ["a", "z", "z"], 0), ("item", [99, 7, 99], 1)], ids=["user", "candidate"]
)
def test_an_id_beyond_its_table_is_a_fault_of_its_request(
    bundle: Path, table: str, known: list[object], row: int
) -> None:
    """A vocabulary and a schema that disagree; the merged matrix would answer with the next table's row."""
    schema = json.loads((bundle / "schema.json").read_text())
    for each in schema["tables"]:
        each["rows"] = 1 if each["name"] == table else each["rows"]
    (bundle / "schema.json").write_text(json.dumps(schema))
    reseal(bundle)
    case, rows = Case(bundle), tiny_rows(3, seed=1)
    unseen = rows.set_column(0, "site", pa.array(["z"] * 3)).set_column(2, "item", pa.array([99] * 3))
    seen = unseen.set_column(unseen.column_names.index(table), table, pa.array(known))
    sound, fault, other = case.ranking.score([case.request(each)[0] for each in (unseen, seen, unseen)])
    assert isinstance(sound, Ranked)
    assert isinstance(other, Ranked)
    assert str(fault).startswith(f"feature '{table}' has id ")
    assert str(fault).endswith(f" at row {row}, its table has 1 rows")


def test_shapes_that_are_no_ranking_request(tiny: Case) -> None:
    (good, _), (many, _) = tiny.request(tiny_rows(2, seed=1)), tiny.request(tiny_rows(51, seed=1))
    two = Request(np.repeat(good.user.keys, 2, axis=0), np.repeat(good.user.numbers, 2, axis=0))
    narrow, none = Request(good.items.keys[:, :1], good.items.numbers), tiny.ranking.blank(0).items
    uneven = Request(good.items.keys, good.items.numbers[:1])
    bad = [many, RankRequest(two, good.items), *(RankRequest(good.user, items) for items in (narrow, none, uneven))]
    messages = [
        "hold 51 candidates, at most 50",
        "input 'user_keys' has 2 rows, wanted one user",
        "input 'item_keys' is int64 [2, 1], wanted int64 [B, 2] with the columns city, item",
        "inputs 'item_keys' and 'item_numbers' have no rows",
        "input 'item_keys' has 2 rows, and input 'item_numbers' 1",
    ]
    *faults, scored = tiny.ranking.score([*bad, good])
    assert isinstance(scored, Ranked)
    for fault, message in zip(faults, messages, strict=True):
        assert message in str(fault)


def test_values_behind_an_unused_place_of_a_list_are_refused(lists: Case) -> None:
    rows = raw_lists(1, seed=3).set_column(1, "history", pa.array([[1, 2]], pa.list_(pa.int64())))
    _, plain = lists.request(rows)
    history = lists.signature.places(lists.signature.keys)["history"]
    keys = plain.keys.copy()
    keys[0, history] = keys[0, history][::-1]
    (fault,) = lists.ranker.score([Request(keys, plain.numbers)])
    assert "column 'history' has a value behind an unused place at row 0" in str(fault)


def _id(name: str, column: str, *, weights: str | None = None) -> dict[str, Any]:
    return {"name": name, "kind": "hash", "table": name, "column": column, "weights": weights, "rows": 50}


def _number(name: str, column: str) -> dict[str, Any]:
    return {"name": name, "column": column, "fill": 1.0, "clip": None, "log1p": False, "mean": 2.0, "std": 3.0}


FEATURES = [
    _id("i", "i"),
    _number("height", "height") | {"kind": "field", "table": "height"},
    _id("u", "u"),
    {"name": "age_bucket", "kind": "buckets", "table": "age_bucket", "column": "age", "boundaries": [20.0, 40.0, 60.0]},
    {"name": "age_x_i", "kind": "cross", "table": "age_x_i", "inputs": ["age_bucket", "i"], "rows": 50},
    _id("tags", "tags", weights="shares"),
    _id("past", "past"),
    {"name": "u_x_age", "kind": "cross", "table": "u_x_age", "inputs": ["u", "age_bucket"], "rows": 50},
    _number("price", "price") | {"kind": "field", "table": "price"},
]
DENSE = [
    {"name": "rate_u_i", "by": ["i", "u"], "kind": "target", "other": 0.5},
    _number("age", "age"),
    {"name": "count_u", "by": ["u"], "kind": "count", "other": 0.0},
    _number("price_too", "price"),
]
COLUMNS = {"i": "int64", "height": "float64", "u": "int64", "age": "float64", "tags": "list<int64>"}
COLUMNS |= {"shares": "list<float64>", "past": "list<int64>", "price": "float64"}
SLOTS = {"tags": 2, "shares": 2, "past": 3}
SIGNATURE: dict[str, Any] = {
    "columns": COLUMNS,
    "keys": ["i", "u", "tags", "past"],
    "numbers": ["height", "age", "price", "shares"],
    "slots": SLOTS,
    "newest": ["past"],
}


def every_kind(folder: Path, user: list[str]) -> tuple[Ranker, Ranking]:
    """A ranker of every kind of feature, whose score is the sum of what it reads."""
    (folder / "transform" / "encoding").mkdir(parents=True)
    state = {"signature": SIGNATURE, "features": FEATURES, "dense": DENSE}
    (folder / "transform" / "transform.json").write_text(json.dumps(state))
    pairs = np.array([[[item], [one]] for item in range(4) for one in range(4)])
    for name, keys in (("rate_u_i", crossed([pairs[:, 0], pairs[:, 1]])), ("count_u", crossed([pairs[:4, 1]]))):
        table = pa.table({"key": keys[:, 0], "value": np.arange(1.0, len(keys) + 1)})
        pq.write_table(table, folder / "transform" / "encoding" / f"{name}.parquet")
    write_slots(folder / "transform")
    features = [
        {"name": step["name"], "table": step["name"], "slots": SLOTS.get(str(step.get("column")), 1)}
        | {"weighted": step["kind"] == "field" or bool(step.get("weights"))}
        | {"dtype": "list<int64>" if step.get("column") in SLOTS else "int64"}
        for step in FEATURES
    ]
    tables = [{"name": step["name"], "rows": 60} for step in FEATURES]
    schema = {"features": features, "dense": [{"name": step["name"]} for step in DENSE], "tables": tables}
    (folder / "schema.json").write_text(json.dumps(schema))

    def rows(ids_BS: torch.Tensor, floats_BN: torch.Tensor) -> torch.Tensor:
        return ids_BS.sum(1, keepdim=True).float() + floats_BN.sum(1, keepdim=True)

    def ranked(*inputs: torch.Tensor) -> torch.Tensor:
        return rows(*inputs[:2]) + rows(*inputs[2:4])[inputs[4]]

    def part(names: set[str]) -> dict[str, Any]:
        kept = {key: [name for name in SIGNATURE[key] if name in names] for key in ("keys", "numbers", "newest")}
        return {"columns": {n: COLUMNS[n] for n in names}, "slots": {n: SLOTS[n] for n in names & set(SLOTS)}, **kept}

    ranker = Ranker(folder, etl.transform, program=Program(rows, ranked))
    parts = {"user": part(set(user)), "items": part(set(COLUMNS) - set(user))}
    return ranker, Ranking(ranker, deploy.ranker, **parts, most=50, rows=16)


@pytest.mark.parametrize(
    "user",
    [
        ["u", "age"],
        ["i", "price"],
        ["u", "age", "height", "past"],
        ["tags", "shares"],
        ["past"],
        ["u", "i", "age"],
        ["age"],
    ],
    ids=" ".join,
)
def test_every_kind_of_feature_on_either_side(tmp_path: Path, user: list[str]) -> None:
    ranker, ranking = every_kind(tmp_path, user)
    rng = np.random.default_rng(3)
    ranked, plain = [], []
    for count in (3, 20, 1):
        key = {name: _some_keys(rng, count, SLOTS.get(name, 0)) for name in SIGNATURE["keys"]}
        number = {
            name: rng.choice([7.0, 33.0, 50.0, MISSING_NUMBER], (count, 1)) for name in ("height", "age", "price")
        }
        number["shares"] = np.where(key["tags"] == etl.transform.NO_KEY, MISSING_NUMBER, rng.random((count, 2)))
        halves: dict[str, list[Any]] = {"user": [], "items": []}
        rows = []
        for matrix, columns in (("keys", key), ("numbers", number)):
            empty = np.zeros((count, 0), np.int64 if matrix == "keys" else np.float64)
            of_user = [columns[name] for name in SIGNATURE[matrix] if name in user]
            items = [columns[name] for name in SIGNATURE[matrix] if name not in user]
            halves["user"].append(np.concatenate([empty, *of_user], axis=1)[:1])
            halves["items"].append(np.concatenate([empty, *items], axis=1))
            whole = [np.repeat(columns[n][:1], count, 0) if n in user else columns[n] for n in SIGNATURE[matrix]]
            rows.append(np.concatenate(whole, axis=1))
        ranked.append(RankRequest(Request(*halves["user"]), Request(*halves["items"])))
        plain.append(Request(*rows))
    for one, other in zip(ranking.score(ranked), ranker.score(plain), strict=True):
        assert isinstance(one, Ranked), one
        assert isinstance(other, Scored), other
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.floats, other.floats)
        np.testing.assert_allclose(one.score, other.score, rtol=1e-6)


def _some_keys(rng: np.random.Generator, count: int, slots: int) -> npt.NDArray[np.int64]:
    """Single values, some missing, or lists of 0 to `slots`."""
    if not slots:
        return rng.choice([0, 1, 2, 3, 99, etl.transform.MISSING_KEY], (count, 1))
    lengths = rng.integers(0, slots + 1, (count, 1))
    return np.where(np.arange(slots) < lengths, rng.integers(0, 9, (count, slots)), etl.transform.NO_KEY)
