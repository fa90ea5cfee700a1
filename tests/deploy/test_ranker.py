"""One bad request never touches another, and no id reads a neighbour's row."""

import json
from pathlib import Path

import numpy as np
import pytest

import etl.pack
import etl.transform
from deploy.ranker import Ranker, Request, Scored, out_of_range
from deploy.served_program import load_program


@pytest.fixture(scope="module")
def ranker(exported: Path) -> Ranker:
    return Ranker(exported, etl.transform, program=load_program(exported))


def request_of(rows: int, *, seed: int) -> Request:
    generator = np.random.default_rng(seed)
    keys = np.stack([etl.pack.text_keys(_texts("abcde", rows, generator)),
                     etl.pack.text_keys(_texts(["Berlin", "Kraków"], rows, generator)),
                     generator.integers(0, 30, rows)], axis=1)  # fmt: skip
    return Request(keys, np.stack([generator.uniform(10, 90, rows), generator.uniform(0, 50, rows)], axis=1))


def _texts(choices: str | list[str], rows: int, generator: np.random.Generator) -> object:
    import pyarrow as pa

    return pa.array([choices[at] for at in generator.integers(0, len(choices), rows)])


def bad_number(value: float) -> Request:
    request = request_of(2, seed=9)
    request.numbers[1, 1] = value
    return request


def filler() -> Request:
    request = request_of(2, seed=9)
    request.keys[1, 1] = etl.transform.NO_KEY
    return request


BAD = {
    "NaN": (bad_number(np.nan), "column 'price' holds nan at row 1"),
    "infinity": (bad_number(np.inf), "column 'price' holds inf at row 1"),
    "too large": (bad_number(1e300), "'price' leaves the range of float32 at row 1"),
    "narrow": (
        Request(np.zeros((2, 2), np.int64), np.zeros((2, 2))),
        "wanted int64 [B, 3] with the columns site, city",
    ),
    "uneven": (Request(np.zeros((2, 3), np.int64), np.zeros((1, 2))), "'keys' has 2 rows, and input 'numbers' 1"),
    "infinity of 32 bits": (
        Request(np.zeros((2, 3), np.int64), np.full((2, 2), -np.inf, np.float32)),
        "column 'age' holds -inf at row 0",
    ),
    "of another type": (Request(np.zeros((2, 3), np.int32), np.zeros((2, 2))), "input 'keys' is int32"),
    "empty": (Request(np.zeros((0, 3), np.int64), np.zeros((0, 2))), "have no rows"),
    "a filler": (filler(), "column 'city' holds -9223372036854775807 at row 1"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_neighbours_of_a_bad_request_score_as_if_alone(ranker: Ranker, kind: str, place: int) -> None:
    bad, message = BAD[kind]
    good = [request_of(3, seed=1), request_of(1, seed=2)]
    alone = [ranker.score([request])[0] for request in good]
    batch = [*good[:place], bad, *good[place:]]
    results = ranker.score(batch)
    assert message in str(results.pop(place))
    for result, wanted in zip(results, alone, strict=True):
        assert isinstance(result, Scored)
        assert isinstance(wanted, Scored)
        np.testing.assert_allclose(result.score, wanted.score, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(result.ids, wanted.ids)


def test_a_batch_of_nothing_but_faults(ranker: Ranker) -> None:
    assert all(isinstance(result, ValueError) for result in ranker.score([bad_number(np.nan)] * 3))


@pytest.mark.parametrize("key", [-1, 2**62, etl.transform.MISSING_KEY])
def test_a_key_of_no_row_reads_row_0(ranker: Ranker, key: int) -> None:
    request = request_of(2, seed=4)
    request.keys[0] = key
    (result,) = ranker.score([request])
    assert isinstance(result, Scored)
    assert result.ids[0, :3].tolist() == [0, 0, 0]


@pytest.mark.parametrize(("id_", "place"), [(-1, (1, 1)), (6, (1, 1)), (5, None), (0, None)])
def test_the_range_of_an_id_is_its_own_table(id_: int, place: tuple[int, int] | None) -> None:
    ids_BS = np.array([[3, 0], [0, id_]])
    assert out_of_range(ids_BS, np.array([4, 6]), lowest_S=np.array([0, 0])) == place


def test_an_id_beyond_its_table_is_a_fault_of_its_request(bundle: Path) -> None:
    """A vocabulary and a schema that disagree; the merged matrix would answer with the next table's row."""
    schema = json.loads((bundle / "schema.json").read_text())
    for table in schema["tables"]:
        table["rows"] = 2 if table["name"] == "item" else table["rows"]
    (bundle / "schema.json").write_text(json.dumps(schema))
    ranker = Ranker(bundle, etl.transform, program=load_program(bundle))
    unseen, seen = request_of(1, seed=5), request_of(1, seed=6)
    unseen.keys[0, 2], seen.keys[0, 2] = -1, 7
    sound, fault = ranker.score([unseen, seen])
    assert isinstance(sound, Scored)
    assert "feature 'item' has id" in str(fault)
    assert "its table has 2 rows" in str(fault)


def test_weights_lie_in_the_mapped_file(ranker: Ranker, exported: Path) -> None:
    assert str(exported / "weights.safetensors") in Path("/proc/self/maps").read_text()


def test_a_number_next_to_the_lowest_is_missing_and_minus_infinity_is_not(ranker: Ranker) -> None:
    requests = [request_of(2, seed=4) for _ in range(3)]
    for request, value in zip(requests, (etl.transform.MISSING_NUMBER, -1.795e308, -np.inf), strict=True):
        request.numbers[:, 0] = value
    exact, near, infinite = ranker.score(requests)
    assert isinstance(exact, Scored)
    assert isinstance(near, Scored)
    np.testing.assert_array_equal(exact.ids, near.ids)
    np.testing.assert_array_equal(exact.floats, near.floats)
    assert "column 'age' holds -inf" in str(infinite)


def test_numbers_of_32_bits_score_as_the_same_ones_of_64(ranker: Ranker) -> None:
    wide = request_of(6, seed=7)
    numbers = wide.numbers.astype(np.float32)
    wide.numbers[:] = numbers
    wide.numbers[2:4, 0], numbers[2:4, 0] = etl.transform.MISSING_NUMBER, (np.finfo(np.float32).min, -3.4028e38)
    one, other = ranker.score([wide, Request(wide.keys, numbers)])
    assert isinstance(one, Scored)
    assert isinstance(other, Scored)
    np.testing.assert_array_equal(one.ids, other.ids)
    np.testing.assert_array_equal(one.floats, other.floats)
    np.testing.assert_allclose(one.score, other.score, rtol=0, atol=1e-6)
