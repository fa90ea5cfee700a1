"""Random numbers by stream and position: any slice of rows can be drawn alone, and always comes out the same."""

import math
from functools import cache

import numpy as np
import numpy.typing as npt

from etl.artifact import seed_of
from etl.transform import Float64s, Int64s, mix

Float32s = npt.NDArray[np.float32]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


class Draws:
    """Position i of a stream is output i of splitmix64 (Steele et al. 2014), started at a key of seed and stream."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def bits(self, stream: str, at: Int64s) -> npt.NDArray[np.uint64]:
        """64 random bits for each position."""
        return mix((at.view(np.uint64) * _GAMMA + np.uint64(_key(self._seed, stream))).view(np.int64))

    def uniform(self, stream: str, at: Int64s) -> Float64s:
        """Between 0 and 1, both excluded."""
        return unit(self.bits(stream, at))

    def normal(self, stream: str, at: Int64s) -> Float64s:
        """Mean 0 and deviation 1 (Box and Muller 1958)."""
        radius = np.sqrt(-2 * np.log(self.uniform(f"{stream}.radius", at)))
        normal: Float64s = radius * np.cos(2 * math.pi * self.uniform(f"{stream}.angle", at))
        return normal

    def normals(self, stream: str, size: int) -> Float64s:
        """Normal draws at the positions 0 to size - 1."""
        return self.normal(stream, np.arange(size))


def unit(bits: npt.NDArray[np.uint64]) -> Float64s:
    """The upper 53 bits as a number between 0 and 1, both excluded."""
    return ((bits >> np.uint64(11)).view(np.int64) + 0.5) * 2.0**-53


def zipf(uniform: Float64s, size: Int64s | int) -> Int64s:
    """Ranks 0 to size - 1 whose frequency falls as one over the rank, from uniform numbers."""
    ranks: Int64s = np.minimum(np.exp(uniform * np.log1p(size)).astype(np.int64), size) - 1
    return ranks


@cache
def _key(seed: int, stream: str) -> int:
    return seed_of("synth", seed, stream)
