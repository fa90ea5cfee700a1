"""Makes items in a thread, a few ahead of who reads them."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")
AHEAD = 8


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, made by a thread that stays a few ahead and ends with the reader; its error is raised here."""
    made: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(AHEAD)
    stop = threading.Event()
    thread = threading.Thread(target=_make, args=(items, made), kwargs={"stop": stop}, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        stop.set()
        thread.join()


def _make(
    items: Iterator[T], made: "queue.Queue[tuple[T | None, BaseException | None]]", *, stop: threading.Event
) -> None:
    """Puts the items, then None; or the error that ended them."""
    try:
        for item in items:
            if not _put(made, (item, None), stop=stop):
                return
        _put(made, (None, None), stop=stop)
    except BaseException as error:
        _put(made, (None, error), stop=stop)


def _put(
    made: "queue.Queue[tuple[T | None, BaseException | None]]",
    pair: tuple[T | None, BaseException | None],
    *,
    stop: threading.Event,
) -> bool:
    """Waits for room; False where the reader has gone."""
    while not stop.is_set():
        with contextlib.suppress(queue.Full):
            made.put(pair, timeout=0.1)
            return True
    return False
