"""Rows that look like the display-ads challenge: a label, 13 skewed whole numbers, 26 anonymous categories."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from etl.synth.draws import Draws, Float32s, unit, zipf
from etl.synth.truth import Known, probability
from etl.transform import Float64s, Int64s


@dataclass(frozen=True)
class _Number:
    """A log-logistic number, rounded down: median, shape (larger is more skewed), lowest and highest value.

    `effect` is what one deviation of its logarithm adds to the logit, `bend` what the square of that adds.
    """

    median: float
    shape: float
    low: int
    high: int
    nulls: float
    effect: float
    bend: float = 0.0


@dataclass(frozen=True)
class _Category:
    """A column of `size` values, the r-th of them 1/r as frequent as the first.

    `effect` is the deviation of its values' effects. Columns that share a number `pair` interact through vectors.
    """

    size: int
    nulls: float = 0.0
    effect: float = 0.2
    pair: int | None = None


NUMBERS = (
    _Number(2, 0.9, 0, 5_775, 0.45, 0.35),
    _Number(6, 1.6, -3, 257_675, 0.0, 0.1),
    _Number(7, 1.1, 0, 65_535, 0.21, 0.1),
    _Number(5, 0.6, 0, 969, 0.22, -0.1, bend=-0.15),
    _Number(3_200, 1.5, 0, 23_159_456, 0.03, -0.3),
    _Number(42, 1.0, 0, 431_037, 0.22, -0.2, bend=-0.2),
    _Number(4, 1.1, 0, 56_311, 0.04, 0.3),
    _Number(8, 0.8, 0, 6_047, 0.001, 0.0, bend=0.1),
    _Number(38, 0.9, 0, 29_019, 0.04, 0.1),
    _Number(1, 0.5, 0, 11, 0.45, 0.2),
    _Number(2, 0.8, 0, 231, 0.04, 0.3),
    _Number(1, 0.9, 0, 4_008, 0.77, 0.2),
    _Number(5, 0.8, 0, 7_393, 0.22, 0.1, bend=-0.15),
)
CATEGORIES = (
    _Category(1_460, pair=0),
    _Category(583, pair=1),
    _Category(1_000_000, 0.03, effect=0.35),
    _Category(800_000, 0.03, effect=0.35),
    _Category(305, pair=1),
    _Category(24, 0.12, pair=0),
    _Category(12_517, effect=0.3),
    _Category(633),
    _Category(3, pair=2),
    _Category(93_145, effect=0.3),
    _Category(5_683, effect=0.25),
    _Category(900_000, 0.03, effect=0.3),
    _Category(3_194),
    _Category(27, pair=2, effect=0.25),
    _Category(14_992, effect=0.25),
    _Category(700_000, 0.03, effect=0.3),
    _Category(10, pair=3, effect=0.3),
    _Category(5_652, effect=0.25),
    _Category(2_173, 0.44),
    _Category(4, 0.44),
    _Category(850_000, 0.03, effect=0.3),
    _Category(18, 0.76),
    _Category(15, pair=3),
    _Category(286_181, 0.03, effect=0.25),
    _Category(105, 0.44, effect=0.25),
    _Category(142_572, 0.44, effect=0.25),
)
USER, ITEM = 2, 3  # the columns whose sizes the numbers of users and of items set
NAMES = ("label", *(f"I{at + 1}" for at in range(len(NUMBERS))), *(f"C{at + 1}" for at in range(len(CATEGORIES))))
_INTERCEPT = -1.35
_RANK = 3
_HEX = np.array([first | second << 8 for first in b"0123456789abcdef" for second in b"0123456789abcdef"], np.uint16)


@dataclass(frozen=True)
class _Values:
    """What is fixed of a column's values [size + 1], a null last: effects at the first and the last day, texts."""

    effects: Float32s
    later: Float32s
    texts: npt.NDArray[np.uint64]
    vectors: Float32s | None


class Criteo:
    """Makes rows by position; what its values mean is drawn once."""

    def __init__(self, seed: int, *, rows: int, users: int | None, items: int | None) -> None:
        self._draws, self._rows = Draws(seed), rows
        sizes = {USER: users, ITEM: items}
        self._sizes = [sizes.get(at) or category.size for at, category in enumerate(CATEGORIES)]
        self._values = [self._drawn(at, size) for at, size in enumerate(self._sizes)]

    def _drawn(self, at: int, size: int) -> _Values:
        category, name = CATEGORIES[at], f"C{at + 1}"
        effects, changes = (self._draws.normals(f"{name}.{what}", size + 1) for what in ("effect", "change"))
        later = category.effect * (0.95 * effects + 0.31 * changes)
        codes = np.concatenate([_distinct(size, first=self._draws.bits(f"{name}.code", np.arange(1))), [0]])
        vectors = None
        if category.pair is not None:
            vectors = self._draws.normals(f"{name}.vector", (size + 1) * _RANK).reshape(-1, _RANK).astype(np.float32)
        return _Values((category.effect * effects).astype(np.float32), later.astype(np.float32), _texts(codes), vectors)

    def batch(self, first: int, count: int) -> tuple[pa.Table, Known]:
        """Rows `first` to `first + count - 1`: columns label (int8), I1 to I13 (int32), C1 to C26 (hex texts)."""
        at = np.arange(first, first + count)
        columns: dict[str, pa.Array] = {}
        logits = np.full(count, _INTERCEPT)
        for position, number in enumerate(NUMBERS):
            columns[f"I{position + 1}"], effect = self._number(number, at, name=f"I{position + 1}")
            logits += effect
        drift, vectors = at / self._rows, dict[int, list[Float32s]]()
        for position, category in enumerate(CATEGORIES):
            values, name = self._values[position], f"C{position + 1}"
            bits = self._draws.bits(name, at)
            ranks = zipf(unit(bits), self._sizes[position])
            null = (bits & np.uint64(0xFFFF)) < np.uint64(round(category.nulls * 0x10000))  # bits `unit` hardly reads
            ranks[null] = self._sizes[position]
            columns[name] = _text_column(values.texts.take(ranks), null)
            logits += values.effects.take(ranks) * (1 - drift) + values.later.take(ranks) * drift
            if category.pair is not None and values.vectors is not None:
                vectors.setdefault(category.pair, []).append(values.vectors.take(ranks, axis=0))
        parts = {"first_order": logits}
        logits = logits + sum(0.25 * np.einsum("br,br->b", *pair) for pair in vectors.values())
        click = self._draws.uniform("label", at) < probability(logits)
        table = pa.table({"label": pa.array(click.view(np.int8)), **columns})
        return table, Known({"click": logits}, {"click": click}, parts | {"pairs": logits})

    def _number(self, number: _Number, at: Int64s, *, name: str) -> tuple[pa.Array, Float64s]:
        bits = self._draws.bits(name, at)
        uniform = unit(bits)
        drawn = number.median * np.exp(number.shape * np.log(uniform / (1 - uniform))) + number.low
        values = np.floor(drawn.clip(number.low, number.high))
        null = (bits & np.uint64(0xFFFF)) < np.uint64(round(number.nulls * 0x10000))
        deviation = np.log((values - number.low + 1) / (number.median + 1)) / (1.8 * number.shape)
        effect = number.effect * deviation + number.bend * (deviation**2 - 1)
        return pa.array(values.astype(np.int32), mask=null), np.where(null, -number.effect, effect.clip(-2, 2))


def _distinct(size: int, *, first: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
    """As many 32-bit codes that look random, each once: an odd multiplier and xor-shifts map one to one."""
    codes = np.arange(size, dtype=np.uint32) + first.astype(np.uint32)
    for multiplier in (0x85EBCA6B, 0xC2B2AE35):
        codes = (codes ^ codes >> np.uint32(16)) * np.uint32(multiplier)
    return codes ^ codes >> np.uint32(15)


def _texts(codes: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint64]:
    """Eight hex digits a code, as the eight bytes of their text."""
    return _HEX[codes.astype(">u4").view(np.uint8)].view(np.uint64)


def _text_column(texts: npt.NDArray[np.uint64], null: npt.NDArray[np.bool_]) -> pa.Array:
    """Texts of eight bytes each; offsets need no computing."""
    offsets = np.arange(0, 8 * len(texts) + 1, 8, dtype=np.int32)
    present = pa.array(~null).buffers()[1]
    return pa.Array.from_buffers(pa.string(), len(texts), [present, pa.py_buffer(offsets), pa.py_buffer(texts)])
