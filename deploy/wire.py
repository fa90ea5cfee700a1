"""Raw values <-> the requests and answers of a served model, without any connection."""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import tritonclient.grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from etl.faults import Fault
from etl.pack import pack
from etl.transform import MISSING_NUMBER, Float64s, Signature

Raw: TypeAlias = pa.Table | Sequence[Mapping[str, object]]
"""Rows of raw values: a table, or dicts with a key a column and None for missing."""
Answer = dict[str, npt.NDArray[Any]]
_TYPES: dict[type, str] = {np.int64: "INT64", np.float64: "FP64", np.float32: "FP32"}
_LOWEST_FP32 = -3.4e38  # from here down a float32 stands for missing


@dataclass(frozen=True)
class Rows:
    """What the server answered: score float32 [B, T] and, where asked for, ids int64 [B, F]; tasks name the scores."""

    tasks: tuple[str, ...]
    score: npt.NDArray[np.float32]
    ids: npt.NDArray[np.int64] | None

    def table(self) -> pa.Table:
        """One probability column a task."""
        return pa.table({task: pa.array(self.score[:, at]) for at, task in enumerate(self.tasks)})


@dataclass(frozen=True)
class Message:
    """One request: its inputs, and the outputs asked for by the name they have in an answer of rows."""

    inputs: list[triton_grpc.InferInput]
    asked: dict[str, str]

    @property
    def outputs(self) -> list[triton_grpc.InferRequestedOutput]:
        """What to ask for."""
        return [triton_grpc.InferRequestedOutput(name) for name in self.asked.values()]

    def answer(self, result: Any) -> Answer:
        """Arrays [B, .] by output."""
        arrays = {name: result.as_numpy(output) for name, output in self.asked.items()}
        return {name: array.reshape(-1, array.shape[-1]) for name, array in arrays.items()}


class Wire:
    """How one model wants to be asked. `described` is the signature in its config, `place` names it in faults."""

    def __init__(self, described: str, *, place: str, deadline_s: float) -> None:
        signature = json.loads(described)
        self.place, self.deadline_s = place, deadline_s
        self.tasks: tuple[str, ...] = tuple(signature["tasks"])
        self.columns: dict[str, str] = dict(signature["columns"])
        self._max_rows = int(signature["max_rows"])
        self._packing = Signature.from_json(signature)
        self._ranking = signature.get("ranking")
        self._narrow = signature.get("numbers_type") == "FP32"

    def rows(self, rows: Raw, *, ids: bool) -> Iterator[Message]:
        """Requests of at most the server's batch. Raises Fault where a value can't be packed."""
        packed = self._pack(rows, self._packing, place="the rows to score")
        asked = {"score": "score", "ids": "ids"} if ids else {"score": "score"}
        for start in range(0, len(packed[0]), self._max_rows):
            part = slice(start, start + self._max_rows)
            yield Message(_inputs("", packed, part=part), asked)

    def ranked(self, user: Mapping[str, object], candidates: Raw, *, ids: bool) -> Iterator[Message]:
        """Requests of one user and at most the server's number of candidates. Raises Fault as `rows`, and where the
        model takes no ranking requests.
        """
        if self._ranking is None:
            remedy = "name the user's columns in [serve] user and export again, or score rows"
            raise Fault(self.place, got="a model of rows alone", wanted="one that ranks", remedy=remedy)
        of_user, of_items = (Signature.from_json(self._ranking[part]) for part in ("user", "items"))
        packed_user = self._pack([user], of_user, place="the user")
        packed = self._pack(candidates, of_items, place="the candidates")
        asked = {"score": "rank_score", "ids": "rank_ids"} if ids else {"score": "rank_score"}
        shared, most = _inputs("user_", packed_user, part=slice(0, 1)), int(self._ranking["max_candidates"])
        for start in range(0, len(packed[0]), most):
            part = slice(start, start + most)
            yield Message([*shared, *_inputs("item_", packed, part=part, batch=(1,))], asked)

    def _pack(self, rows: Raw, signature: Signature, *, place: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Keys and numbers of the types that the server takes. Raises Fault where a value can't be packed."""
        try:
            packed = pack(rows if isinstance(rows, pa.Table) else _table(rows, signature), signature)
            return packed.keys, narrow(packed.numbers, signature) if self._narrow else packed.numbers
        except (ValueError, pa.ArrowException) as error:
            wanted = _columns(signature.columns)
            raise Fault(place, got=str(error), wanted=wanted, remedy="mend the rows") from None

    def result(self, answers: Sequence[Answer], *, ids: bool) -> Rows:
        """The answers of all requests, in their order, as one."""
        score_BT = np.concatenate([np.empty((0, len(self.tasks)), np.float32), *(each["score"] for each in answers)])
        return Rows(
            self.tasks, score_BT, np.concatenate([each["ids"] for each in answers]) if ids and answers else None
        )

    def refuse(self, error: InferenceServerException) -> NoReturn:
        """Raises the Fault that says what to do about it."""
        refuse(error, place=self.place, deadline_s=self.deadline_s, wanted=_columns(self.columns))


def signature_of(config: Any, *, place: str) -> str:
    """The signature in a model's config. Raises Fault where there is none."""
    parameters = config.config.parameters
    if "signature" not in parameters:
        got, remedy = "a model without a signature", "serve a bundle with 'python -m deploy serve'"
        raise Fault(place, got=got, wanted="a model served from a bundle", remedy=remedy)
    return str(parameters["signature"].string_value)


def refuse(error: InferenceServerException, *, place: str, deadline_s: float, wanted: str) -> NoReturn:
    """Raises the Fault that an error of the server or of the connection stands for."""
    status, message = str(error.status()), str(error.message())
    if status.endswith("DEADLINE_EXCEEDED"):
        limit, remedy = f"an answer within {deadline_s:g} s", "raise the deadline, or send fewer rows at once"
        raise Fault(place, got="no answer", wanted=limit, remedy=remedy) from None
    if status.endswith("INVALID_ARGUMENT"):
        raise Fault(place, got=message, wanted=wanted, remedy="mend the rows") from None
    remedy = "start it with 'python -m deploy serve BUNDLE' and give its gRPC address as HOST:PORT"
    raise Fault(place, got=message, wanted="a server that serves this model", remedy=remedy) from None


def pause_s(error: InferenceServerException, *, attempt: int, left_s: float) -> float | None:
    """How long to wait before a request is sent again, or None where that is of no use.

    A score depends on its request alone, so that asking twice does no harm. A server that can't be reached or drains
    (UNAVAILABLE), or whose model process died, may be back in a moment; what it answered otherwise, it will again.
    Waits double from 50 ms to 1 s, each shortened by up to a half by chance, so that clients do not come together.
    """
    dead = "Stub process" in str(error.message())
    pause = min(0.05 * 2**attempt, 1.0) * random.uniform(0.5, 1.0)
    return pause if (dead or str(error.status()).endswith("UNAVAILABLE")) and pause < left_s else None


def narrow(numbers: Float64s, signature: Signature) -> npt.NDArray[np.float32]:
    """As float32. Raises ValueError naming the first column with a value that it doesn't hold exactly."""
    found, missing = as_float32(numbers), numbers == MISSING_NUMBER
    if (lost := ~missing & ((found != numbers) | (found <= _LOWEST_FP32))).any():
        row, at = np.argwhere(lost)[0]
        name = signature.packed_names(signature.numbers)[at]
        raise ValueError(f"column '{name}' holds {float(numbers[row, at])!r} at row {row}, which is no float32")
    return found


def as_float32(numbers: Float64s) -> npt.NDArray[np.float32]:
    """The nearest float32 of each, its lowest one for missing."""
    lowest = np.finfo(np.float32).min
    with np.errstate(over="ignore"):
        return np.where(numbers == MISSING_NUMBER, lowest, numbers).astype(np.float32)


def _table(rows: Sequence[Mapping[str, object]], signature: Signature) -> pa.Table:
    """All keys of all rows become columns, so that none is dropped in silence; no row at all has all columns."""
    names = dict.fromkeys(name for row in rows for name in row) if rows else signature.columns
    return pa.table({name: _column(name, [row.get(name) for row in rows]) for name in names})


def _column(name: str, values: list[object]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise ValueError(f"column '{name}': {error}") from None


def _columns(columns: Mapping[str, str]) -> str:
    return "the columns " + ", ".join(f"{name} ({dtype})" for name, dtype in columns.items())


def _inputs(
    prefix: str, packed: tuple[npt.NDArray[Any], npt.NDArray[Any]], *, part: slice, batch: tuple[int, ...] = ()
) -> list[triton_grpc.InferInput]:
    """The matrices that have columns; `batch` are dimensions of 1 in front."""
    found = []
    for name, whole in zip(("keys", "numbers"), packed, strict=True):
        array = whole[part]
        if array.shape[1]:
            tensor = triton_grpc.InferInput(f"{prefix}{name}", [*batch, *array.shape], _TYPES[array.dtype.type])
            tensor.set_data_from_numpy(np.ascontiguousarray(array).reshape(*batch, *array.shape))
            found.append(tensor)
    return found
