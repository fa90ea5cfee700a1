"""Numbers filled, clipped and taken the logarithm of in two compiled loops; numpy alone goes over a column twice as
often, through memory that it takes anew each time.
"""

from collections.abc import Sequence

import numba
import numpy as np

from etl.engines.compiled import CompiledVocabulary, compiled
from etl.transform import MISSING_NUMBER, Float32s, Float64s, Int64s, State, Transform

_COLUMN = numba.float64[::1]


class FastTransform(Transform):
    """Gives the same ids, counts and floats as the served one."""

    def look_up(
        self, steps: Sequence[State], key_SB: Int64s, *, places: Sequence[slice], ids_SB: Int64s
    ) -> Sequence[Sequence[int]]:
        """As it says there: a column of single values in one go."""
        vocabulary = self.vocabularies[steps[0]["table"]] if steps[0]["kind"] == "vocabulary" else None
        if len(key_SB) > 1 or not isinstance(vocabulary, CompiledVocabulary):
            return super().look_up(steps, key_SB, places=places, ids_SB=ids_SB)
        return [[count] for count in vocabulary.into(ids_SB[0], key_SB[0])]

    def scale(self, numbers_NB: Float64s, steps: State, *, into: Float32s) -> None:
        """As it says there."""
        scale(numbers_NB, steps, into=into)


def scale(numbers_NB: Float64s, steps: State, *, into: Float32s | Float64s) -> None:
    """What `etl.transform.scale` makes of numbers [N, B] with the settings of N steps, to the last bit."""
    settings = [np.ravel(steps[name]).tolist() for name in ("fill", "log1p", "mean", "std")]
    filled, logs = np.empty((2, numbers_NB.shape[1]))
    with np.errstate(over="ignore"):  # float32 may not hold a number, which ends up as infinity
        for at, (fill, log1p, mean, std) in enumerate(zip(*settings, strict=True)):
            low, high = np.reshape(steps["clip"], (-1, 2))[at]
            filled[:] = numbers_NB[at]
            _fill(filled, (fill, low, high, 0.0 if log1p else -np.inf))
            if log1p:
                np.log(np.add(filled, 1.0, out=logs), out=logs)
                _log1p(filled, logs)
            filled -= mean
            np.divide(filled, std, out=into[at])


@compiled(_COLUMN, numba.types.UniTuple(numba.float64, 4))
def _fill(numbers: Float64s, settings: tuple[float, float, float, float]) -> None:
    """What is missing is filled, then all is clipped; `floor` is the lowest number with a logarithm."""
    fill, low, high, floor = settings
    for i in range(len(numbers)):
        x = numbers[i] if numbers[i] > MISSING_NUMBER else fill  # NaN isn't above it either
        x = x if x > low else low
        x = x if x < high else high
        numbers[i] = x if x > floor else floor


@compiled(_COLUMN, _COLUMN)
def _log1p(x: Float64s, logs: Float64s) -> None:
    """log(1 + x) in the place of x: the logarithms of what 1 + x came to, with what that lost given back."""
    for i in range(len(x)):
        above = x[i] + 1.0
        x[i] = (x[i] - (above - 1.0)) / above + logs[i]
