"""Work on several cores, in the order of its parts."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Part = TypeVar("Part")
Done = TypeVar("Done")


def ahead(parts: Iterable[Part], *, count: int = 2) -> Iterator[Part]:
    """The same parts; a thread makes so many of the next ones while one is worked on."""
    rest, end = iter(parts), object()
    with ThreadPoolExecutor(1) as pool:
        pending = deque(pool.submit(next, rest, end) for _ in range(count))
        while (part := pending.popleft().result()) is not end:
            pending.append(pool.submit(next, rest, end))
            yield part  # type: ignore[misc]


def in_order(work: Callable[[Part], Done], parts: Iterable[Part], *, beside: int = 0) -> Iterator[Done]:
    """What `work` makes of the parts, in their order; as many at once as there are cores, so memory stays bounded.

    `beside` cores are left to who makes the parts and who takes what is done.
    """
    cores = max(1, len(os.sched_getaffinity(0)) - beside)
    with ThreadPoolExecutor(cores) as pool:
        pending: deque[Future[Done]] = deque()
        for part in parts:
            pending.append(pool.submit(work, part))
            if len(pending) > cores:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
