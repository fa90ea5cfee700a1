"""Hash tables as files that several processes map: equal to those in memory, shared, and whole or refused."""

import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from etl.lookup import MISSING_KEY, NO_KEY, Encoding, Vocabulary, write_slots

KEYS = np.random.default_rng(1).integers(-(2**62), 2**62, 5000)
ASKED = np.concatenate([KEYS, [MISSING_KEY, NO_KEY, 7], KEYS + 1]).reshape(-1, 1)


@pytest.fixture
def transform(tmp_path: Path) -> Path:
    """A `transform/` with a vocabulary, an encoding, and their hash tables."""
    for name in ("vocabulary", "encoding"):
        (tmp_path / name).mkdir()
    rows, values = np.arange(1, len(KEYS) + 1), np.linspace(-1.0, 1.0, len(KEYS))
    values[:2] = 0.0, -0.0
    pq.write_table(pa.table({"key": KEYS, "row": rows}), tmp_path / "vocabulary" / "item.parquet")
    pq.write_table(pa.table({"key": KEYS, "value": values}), tmp_path / "encoding" / "rate.parquet")
    write_slots(tmp_path)
    return tmp_path


def test_a_mapped_vocabulary_finds_what_one_in_memory_finds(transform: Path) -> None:
    path = transform / "vocabulary" / "item.parquet"
    rows = {key: at + 1 for at, key in enumerate(KEYS.tolist())}
    wanted = [[rows.get(key, 0)] for key in ASKED[:, 0].tolist()]
    assert Vocabulary.mapped(path)(ASKED).tolist() == wanted == Vocabulary.read(path)(ASKED).tolist()


@pytest.mark.parametrize("other", [0.25, 0.0, -0.0, float("inf")])
def test_a_mapped_encoding_has_the_same_bits_as_its_parquet(transform: Path, other: float) -> None:
    path = transform / "encoding" / "rate.parquet"
    values = dict(zip(KEYS.tolist(), pq.read_table(path)["value"].to_pylist(), strict=True))
    wanted = np.array([[values.get(key, other)] for key in ASKED[:, 0].tolist()]).view(np.int64)
    for made in (Encoding.mapped(path, other), Encoding.read(path, other)):
        np.testing.assert_array_equal(made(ASKED).view(np.int64), wanted)


def test_whole_numbers_are_values_too(transform: Path) -> None:
    path = transform / "encoding" / "count.parquet"
    pq.write_table(pa.table({"key": KEYS[:3], "value": pa.array([3, 2, 1])}), path)
    write_slots(transform)
    for made in (Encoding.mapped(path, 0.5), Encoding.read(path, 0.5)):
        assert made(KEYS[:4]).tolist() == [3.0, 2.0, 1.0, 0.5]


def test_no_table_is_one_that_knows_no_key(tmp_path: Path) -> None:
    (tmp_path / "vocabulary").mkdir()
    path = tmp_path / "vocabulary" / "item.parquet"
    pq.write_table(pa.table({"key": pa.array([], pa.int64()), "row": pa.array([], pa.int64())}), path)
    write_slots(tmp_path)
    assert not Vocabulary.mapped(path)(ASKED).any()


def test_two_that_are_loaded_map_one_file(transform: Path) -> None:
    """No copy: the arrays lie in the mapping, and what the file says later is what both find."""
    path = transform / "vocabulary" / "item.parquet"
    one, two = Vocabulary.mapped(path), Vocabulary.mapped(path)
    for made in (one, two):
        assert [_mapping(part) is not None for part in (made._keys, made._rows)] == [True, True]
        assert made(KEYS[:3]).tolist() == [1, 2, 3]
    slots = np.load(path.with_suffix(".npy"), mmap_mode="r+")
    slots[1] += 10
    assert one(KEYS[:3]).tolist() == two(KEYS[:3]).tolist() == [11, 12, 13]


def _mapping(array: np.ndarray | mmap.mmap | None) -> mmap.mmap | None:
    """What holds the memory of an array, if that is a mapped file."""
    while isinstance(array, np.ndarray):
        array = array.base
    return array if isinstance(array, mmap.mmap) else None


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4096])


def _lengthened(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(8))


def _emptied(path: Path) -> None:
    path.write_bytes(b"")


def _of_another_type(path: Path) -> None:
    np.save(path, np.zeros((2, 16)))


def _of_another_shape(path: Path) -> None:
    np.save(path, np.zeros((2, 24), np.int64))


def _pickled(path: Path) -> None:
    np.save(path, np.array([{}]), allow_pickle=True)


@pytest.mark.parametrize(
    ("harm", "got"),
    [
        (Path.unlink, "No such file"),
        (_cut, "mmap length is greater than file size"),
        (_lengthened, "bytes, wanted"),
        (_emptied, "No data left"),
        (_of_another_type, "float64"),
        (_of_another_shape, "24"),
        (_pickled, "object"),
    ],
)
def test_a_file_that_is_no_whole_table_is_refused_by_name(
    transform: Path, harm: Callable[[Path], None], got: str
) -> None:
    path = transform / "vocabulary" / "item.npy"
    harm(path)
    with pytest.raises(ValueError, match=got) as fault:
        Vocabulary.mapped(path.with_suffix(".parquet"))
    assert str(path) in str(fault.value) and "copy the bundle anew, or export it again" in str(fault.value)
