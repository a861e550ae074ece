"""Work ahead on a thread: the next items are made while the caller uses the one at hand.

Reading images, decoding them and cutting tiles release the interpreter's lock, so they cost the
caller nothing while a model computes. How many items may be ahead is bounded, and so is the memory.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")
PREFETCH_DEPTH = 2  # batches that wait; the images of more would only take memory
POLL_SECONDS = 0.1  # how soon the thread notices that its reader is gone

Job = tuple[Future[T], S]


def background(function: Callable[[], T]) -> Future[T]:
    """Call a function on a thread; ``result()`` waits for what it returns or raises."""
    future: Future[T] = Future()
    jobs: queue.SimpleQueue[Job[T, None] | None] = queue.SimpleQueue()
    jobs.put((future, None))
    jobs.put(None)
    threading.Thread(target=run_jobs, args=(lambda _: function(), jobs), daemon=True).start()
    return future


def map_ahead(function: Callable[[S], T], items: Iterable[S], ahead: int = 1) -> Iterator[T]:
    """Yield ``function`` of each item, in order, computed on a thread up to ``ahead`` items early.

    The items are read in the caller's thread, so they may come from anywhere. An exception of
    ``function`` is raised in the place of its item, and ends the iteration. A reader that leaves
    never waits for what the thread is doing.
    """
    jobs: queue.SimpleQueue[Job[T, S] | None] = queue.SimpleQueue()
    threading.Thread(target=run_jobs, args=(function, jobs), daemon=True).start()
    pending: deque[Future[T]] = deque()
    try:
        for item in items:
            pending.append(Future())
            jobs.put((pending[-1], item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        jobs.put(None)


def run_jobs(function: Callable[[S], T], jobs: "queue.SimpleQueue[Job[T, S] | None]") -> None:
    """Compute what is asked for until None comes."""
    while (job := jobs.get()) is not None:
        future, item = job
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(function(item))
        except BaseException as error:  # noqa: BLE001  raised again in the reader's thread
            future.set_exception(error)
        del job, future, item  # while the next job is waited for, nothing of this one stays


def prefetch(items: Iterator[T], depth: int = PREFETCH_DEPTH) -> Generator[T, None, None]:
    """Yield the items in order, made by a background thread up to ``depth`` items ahead.

    An exception of ``items`` is raised here, after the items before it. When the reader leaves, a
    generator is closed on the thread that runs it, once the item in work is done.
    """
    ready: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(depth)
    closed = threading.Event()

    def put(kind: str, value: T | BaseException | None) -> bool:
        while not closed.is_set():
            try:
                ready.put((kind, value), timeout=POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:  # noqa: BLE001  raised again in the reader's thread
            put("error", error)
        finally:
            if isinstance(items, Generator):
                items.close()

    threading.Thread(target=produce, daemon=True).start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                assert isinstance(value, BaseException)
                raise value
            if kind == "end":
                return
            yield value  # type: ignore[misc]
    finally:
        closed.set()
