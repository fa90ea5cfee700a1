"""Deadlines and tries of both clients, by a server of scripted answers that takes no Triton."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from deploy.client import AsyncClient, Client
from etl.faults import Fault

SIGNATURE = {
    "columns": {"x": "float64"}, "keys": [], "numbers": ["x"], "slots": {}, "newest": [],
    "tasks": ["click"], "max_rows": 2,
}  # fmt: skip
ROWS = [{"x": float(at)} for at in range(5)]  # three requests
Failure = tuple[grpc.StatusCode, str]
Score = Callable[[str, float], npt.NDArray[np.float32]]
GONE = (grpc.StatusCode.UNAVAILABLE, "the server is stopping")
DEAD = (grpc.StatusCode.INTERNAL, "Stub process 'ranker_0_0' is not healthy.")
WRONG = (grpc.StatusCode.INVALID_ARGUMENT, "column 'x' leaves the range of float32 at row 0")
BROKEN = (grpc.StatusCode.INTERNAL, "no such output")


class Scripted(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Fails in the ways of `failures`, one a request, and scores each x as x / 8 afterwards; may hang instead."""

    def __init__(self) -> None:
        self.failures: list[Failure] = []
        self.asked, self.hangs, self.url, self.ended = 0, False, "", threading.Event()

    def ModelConfig(self, request: Any, context: Any) -> Any:
        answer = pb.ModelConfigResponse()
        answer.config.parameters["signature"].string_value = json.dumps(SIGNATURE)
        return answer

    def ModelInfer(self, request: Any, context: Any) -> Any:
        self.asked += 1
        if self.hangs:
            self.ended.wait()
        if self.failures:
            self._fail(context)
        x_B1 = np.frombuffer(request.raw_input_contents[0], np.float64)
        answer = pb.ModelInferResponse(raw_output_contents=[(x_B1 / 8).astype(np.float32).tobytes()])
        answer.outputs.add(name="score", datatype="FP32", shape=[len(x_B1), 1])
        return answer

    def _fail(self, context: Any) -> NoReturn:
        context.abort(*self.failures.pop(0))
        raise AssertionError("abort raises")


@pytest.fixture
def server() -> Iterator[Scripted]:
    scripted = Scripted()
    with ThreadPoolExecutor(max_workers=8) as threads:
        listening = grpc.server(threads)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(scripted, listening)
        scripted.url = f"127.0.0.1:{listening.add_insecure_port('127.0.0.1:0')}"
        listening.start()
        yield scripted
        scripted.ended.set()
        listening.stop(None).wait()


def blocking(url: str, deadline_s: float) -> npt.NDArray[np.float32]:
    with Client(url, deadline_s=deadline_s) as client:
        return client.score(ROWS).score


def with_asyncio(url: str, deadline_s: float) -> npt.NDArray[np.float32]:
    async def score() -> npt.NDArray[np.float32]:
        async with AsyncClient(url, deadline_s=deadline_s) as client:
            return (await client.score(ROWS)).score

    return asyncio.run(score())


both = pytest.mark.parametrize("score", [blocking, with_asyncio])


@both
@pytest.mark.parametrize("failures", [[GONE, GONE], [DEAD], [GONE, DEAD, GONE, GONE]])
def test_what_may_go_away_is_tried_again_and_the_answers_stay_in_order(
    server: Scripted, score: Score, failures: list[Failure]
) -> None:
    server.failures = list(failures)
    np.testing.assert_array_equal(score(server.url, 30.0)[:, 0], np.arange(5, dtype=np.float32) / 8)
    assert server.asked == 3 + len(failures)


@both
@pytest.mark.parametrize("failure", [WRONG, BROKEN])
def test_what_the_server_refuses_is_not_sent_again(server: Scripted, score: Score, failure: Failure) -> None:
    server.failures = [failure]
    with pytest.raises(Fault, match=failure[1]):
        score(server.url, 30.0)
    assert server.asked <= 3, "each of the three requests once"


@both
def test_the_deadline_ends_the_tries(server: Scripted, score: Score) -> None:
    server.failures = [GONE] * 10_000
    began = time.monotonic()
    with pytest.raises(Fault, match=r"the server is stopping|within 0\.5 s"):
        score(server.url, 0.5)
    assert time.monotonic() - began < 10
    assert server.asked > 3, "no request was tried again"


@both
def test_the_deadline_ends_the_wait_for_an_answer(server: Scripted, score: Score) -> None:
    server.hangs = True
    began = time.monotonic()
    with pytest.raises(Fault, match=r"got no answer; wanted an answer within 0\.5 s"):
        score(server.url, 0.5)
    assert time.monotonic() - began < 10
    server.ended.set()
