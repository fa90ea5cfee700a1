"""The clients: raw values in, probabilities out. They know the server's address; the model says how to pack a row."""

import asyncio
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tritonclient.utils import InferenceServerException

from deploy.connect import connect, connect_async
from deploy.wire import Answer, Message, Raw, Wire, pause_s, refuse, signature_of
from deploy.wire import Rows as Rows

MODEL = "ranker"
_IN_FLIGHT = 4
_DEADLINE_S = 10.0


class Client:
    """A connection to one served model, kept open. Threads may share it.

    Every request ends within `deadline_s`, tries included, and the server drops what is late. More rows than the
    server's batch are several requests, four of them on the way at a time.
    """

    def __init__(
        self, url: str, model: str = MODEL, *, deadline_s: float = _DEADLINE_S, tls: Path | None = None
    ) -> None:
        """Raises Fault where no such model answers at `url` (HOST:PORT, gRPC). `tls` is a folder, see `connect`."""
        self._model, self._deadline_s = model, deadline_s
        place = f"{url}: model '{model}'"
        try:
            self._server = connect(url, tls=tls)
            config = self._server.get_model_config(model, client_timeout=deadline_s)
        except InferenceServerException as error:
            refuse(error, place=place, deadline_s=deadline_s, wanted="a model served from a bundle")
        self._wire = Wire(signature_of(config, place=place), place=place, deadline_s=deadline_s)
        self.tasks, self.columns = self._wire.tasks, self._wire.columns

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        self._server.close()

    def score(self, rows: Raw, *, ids: bool = False) -> Rows:
        """Scores raw rows: a table, or dicts with a key a column and None for missing.

        Raises:
            Fault: columns or values that the model does not take, a deadline passed, a server that can't be reached.
        """
        return self._wire.result(list(self._answers(self._wire.rows(rows, ids=ids))), ids=ids)

    def rank(self, user: Mapping[str, object], candidates: Raw, *, ids: bool = False) -> Rows:
        """Scores one user's candidates, in their order; the user's columns travel once. Raises Fault as `score`."""
        return self._wire.result(list(self._answers(self._wire.ranked(user, candidates, ids=ids))), ids=ids)

    def _answers(self, messages: Iterator[Message]) -> Iterator[Answer]:
        """Several requests on the way, answers in order."""
        waiting: deque[tuple[Message, float, Future[Any]]] = deque()
        for message in messages:
            if len(waiting) == _IN_FLIGHT:
                yield self._first(waiting)
            waiting.append((message, time.monotonic() + self._deadline_s, self._send(message, self._deadline_s)))
        while waiting:
            yield self._first(waiting)

    def _first(self, waiting: deque[tuple[Message, float, Future[Any]]]) -> Answer:
        message, end, future = waiting.popleft()
        return self._answer(message, end, future=future)

    def _answer(self, message: Message, end: float, *, future: "Future[Any]") -> Answer:
        attempt = 0
        while True:
            try:
                return message.answer(future.result())
            except InferenceServerException as error:
                pause = pause_s(error, attempt=attempt, left_s=end - time.monotonic())
                if pause is None:
                    self._wire.refuse(error)
            time.sleep(pause)
            attempt += 1
            future = self._send(message, max(end - time.monotonic(), 1e-3))

    def _send(self, message: Message, timeout_s: float) -> "Future[Any]":
        future: Future[Any] = Future()

        def done(result: Any, error: InferenceServerException | None) -> None:
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._server.async_infer(
            self._model, message.inputs, callback=done, outputs=message.outputs, client_timeout=timeout_s
        )
        return future


class AsyncClient:
    """The same for asyncio: `async with AsyncClient(url) as client: await client.score(rows)`. Tasks may share it."""

    def __init__(
        self, url: str, model: str = MODEL, *, deadline_s: float = _DEADLINE_S, tls: Path | None = None
    ) -> None:
        """Connects when it is entered."""
        self._url, self._model, self._deadline_s, self._tls = url, model, deadline_s, tls

    async def __aenter__(self) -> Self:
        """Raises Fault where no such model answers."""
        place = f"{self._url}: model '{self._model}'"
        self._server = connect_async(self._url, tls=self._tls)
        try:
            config = await self._server.get_model_config(self._model, client_timeout=self._deadline_s)
            self._wire = Wire(signature_of(config, place=place), place=place, deadline_s=self._deadline_s)
        except BaseException as error:
            await self._server.close()
            if isinstance(error, InferenceServerException):
                refuse(error, place=place, deadline_s=self._deadline_s, wanted="a model served from a bundle")
            raise
        self.tasks, self.columns = self._wire.tasks, self._wire.columns
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._server.close()

    async def score(self, rows: Raw, *, ids: bool = False) -> Rows:
        """As `Client.score`."""
        return self._wire.result(await self._answers(self._wire.rows(rows, ids=ids)), ids=ids)

    async def rank(self, user: Mapping[str, object], candidates: Raw, *, ids: bool = False) -> Rows:
        """As `Client.rank`."""
        return self._wire.result(await self._answers(self._wire.ranked(user, candidates, ids=ids)), ids=ids)

    async def _answers(self, messages: Iterator[Message]) -> list[Answer]:
        free = asyncio.Semaphore(_IN_FLIGHT)

        async def answer(message: Message) -> Answer:
            async with free:
                return await self._answer(message)

        tasks = [asyncio.create_task(answer(message)) for message in messages]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # where one failed, the others are of no use
                task.cancel()

    async def _answer(self, message: Message) -> Answer:
        end, attempt = time.monotonic() + self._deadline_s, 0
        while True:
            try:
                result = await self._server.infer(
                    self._model,
                    message.inputs,
                    outputs=message.outputs,
                    client_timeout=max(end - time.monotonic(), 1e-3),
                )
                return message.answer(result)
            except InferenceServerException as error:
                pause = pause_s(error, attempt=attempt, left_s=end - time.monotonic())
                if pause is None:
                    self._wire.refuse(error)
            await asyncio.sleep(pause)
            attempt += 1
