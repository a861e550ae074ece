"""Read the next batches while the model is busy with this one."""

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")
DEPTH = 2  # batches that wait: pictures of more would only take memory
TICK_S = 0.1  # how soon a reader hears that nobody wants more


def ahead(items: Iterator[T], depth: int = DEPTH) -> Iterator[T]:
    """Yield what ``items`` yield, in their order, made by a thread of its own some items ahead.

    What is raised there is raised here, when its turn comes.
    """
    waiting: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(depth)
    over = threading.Event()

    def hand_over(kind: str, value: T | BaseException | None) -> bool:
        while not over.is_set():
            try:
                waiting.put((kind, value), timeout=TICK_S)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for item in items:
                if not hand_over("item", item):
                    return
            hand_over("end", None)
        except BaseException as error:  # noqa: BLE001  it is raised where it can be told
            hand_over("fault", error)

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            kind, value = waiting.get()
            if kind == "fault":
                assert isinstance(value, BaseException)
                raise value
            if kind == "end":
                return
            yield value  # type: ignore[misc]
    finally:
        over.set()
