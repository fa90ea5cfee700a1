"""The client: raw rows in, probabilities out. It knows the server's address alone; the model says how to pack a row."""

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import tritonclient.grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from deploy.connect import connect
from etl.faults import Fault
from etl.pack import pack
from etl.transform import Packed, Signature

MODEL = "ranker"
_IN_FLIGHT = 4


@dataclass(frozen=True)
class Rows:
    """What the server answered: score float32 [B, T] and, where asked for, ids int64 [B, F]; tasks name the scores."""

    tasks: tuple[str, ...]
    score: npt.NDArray[np.float32]
    ids: npt.NDArray[np.int64] | None

    def table(self) -> pa.Table:
        """One probability column a task."""
        return pa.table({task: pa.array(self.score[:, at]) for at, task in enumerate(self.tasks)})


class Client:
    """A connection to one served model. Every call ends within `deadline_s`, and the server drops what is late."""

    def __init__(self, url: str, model: str = MODEL, *, deadline_s: float = 10.0, tls: Path | None = None) -> None:
        """Raises Fault where no such model answers at `url` (HOST:PORT, gRPC). `tls` is a folder, see `connect`."""
        self._url, self._model, self._deadline_s = url, model, deadline_s
        try:
            self._server = connect(url, tls=tls)
        except InferenceServerException as error:
            self._refuse(error)
        signature = self._signature()
        self.tasks: tuple[str, ...] = tuple(signature["tasks"])
        self.columns: dict[str, str] = dict(signature["columns"])
        self._max_rows = int(signature["max_rows"])
        self._packing = Signature.from_json(signature)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        self._server.close()

    def score(self, rows: pa.Table | Sequence[Mapping[str, object]], *, ids: bool = False) -> Rows:
        """Scores raw rows: a table, or dicts with a key a column and None for missing.

        Raises:
            Fault: columns or values that the model does not take, a deadline passed, a server that can't be reached.
        """
        try:
            table = rows if isinstance(rows, pa.Table) else _table(rows)
            packed = pack(table, self._packing)
        except (ValueError, pa.ArrowException) as error:
            remedy = "mend the rows"
            raise Fault("the rows to score", got=str(error), wanted=self._wanted(), remedy=remedy) from None
        outputs = ("score", "ids") if ids else ("score",)
        results = list(self._chunks(packed, outputs))
        score_BT = np.concatenate([np.empty((0, len(self.tasks)), np.float32), *(each["score"] for each in results)])
        ids_BF = np.concatenate([each["ids"] for each in results]) if ids and results else None
        return Rows(self.tasks, score_BT, ids_BF)

    def _chunks(self, packed: Packed, outputs: Sequence[str]) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """Requests of at most the server's batch, several in flight, answers in order."""
        waiting: deque[Future[dict[str, npt.NDArray[Any]]]] = deque()
        for start in range(0, len(packed.keys), self._max_rows):
            if len(waiting) == _IN_FLIGHT:
                yield self._answer(waiting.popleft())
            rows = slice(start, start + self._max_rows)
            waiting.append(self._send(Packed(packed.keys[rows], packed.numbers[rows]), outputs))
        while waiting:
            yield self._answer(waiting.popleft())

    def _send(self, packed: Packed, outputs: Sequence[str]) -> "Future[dict[str, npt.NDArray[Any]]]":
        future: Future[dict[str, npt.NDArray[Any]]] = Future()

        def done(result: Any, error: InferenceServerException | None) -> None:
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result({name: result.as_numpy(name) for name in outputs})

        self._server.async_infer(
            self._model,
            [_input(name, array) for name, array in (("keys", packed.keys), ("numbers", packed.numbers)) if array.size],
            callback=done,
            outputs=[triton_grpc.InferRequestedOutput(name) for name in outputs],
            client_timeout=self._deadline_s,
        )
        return future

    def _answer(self, future: "Future[dict[str, npt.NDArray[Any]]]") -> dict[str, npt.NDArray[Any]]:
        try:
            return future.result()
        except InferenceServerException as error:
            self._refuse(error)

    def _signature(self) -> Any:
        try:
            answer = self._server.get_model_config(self._model, client_timeout=self._deadline_s)
        except InferenceServerException as error:
            self._refuse(error)
        parameters = answer.config.parameters
        if "signature" not in parameters:
            place, got = f"{self._url}: model '{self._model}'", "a model without a signature"
            remedy = "serve a bundle with 'python -m deploy serve'"
            raise Fault(place, got=got, wanted="a model served from a bundle", remedy=remedy)
        return json.loads(parameters["signature"].string_value)

    def _wanted(self) -> str:
        return "the columns " + ", ".join(f"{name} ({dtype})" for name, dtype in self.columns.items())

    def _refuse(self, error: InferenceServerException) -> NoReturn:
        status, message = str(error.status()), str(error.message())
        place = f"{self._url}: model '{self._model}'"
        if status.endswith("DEADLINE_EXCEEDED"):
            wanted, remedy = (
                f"an answer within {self._deadline_s:g} s",
                "raise the deadline, or send fewer rows at once",
            )
            raise Fault(place, got="no answer", wanted=wanted, remedy=remedy) from None
        if status.endswith("INVALID_ARGUMENT"):
            raise Fault(place, got=message, wanted=self._wanted(), remedy="mend the rows") from None
        remedy = "start it with 'python -m deploy serve BUNDLE' and give its gRPC address as HOST:PORT"
        raise Fault(place, got=message, wanted="a server that serves this model", remedy=remedy) from None


def _table(rows: Sequence[Mapping[str, object]]) -> pa.Table:
    """All keys of all rows become columns, so that none is dropped in silence."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})


def _input(name: str, array: npt.NDArray[Any]) -> triton_grpc.InferInput:
    kind = {"keys": "INT64", "numbers": "FP64"}[name]
    tensor = triton_grpc.InferInput(name, list(array.shape), kind)
    tensor.set_data_from_numpy(np.ascontiguousarray(array))
    return tensor
