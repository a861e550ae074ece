"""Prefetching: the same items in the same order, and no thread left behind."""

import threading
import time

import pytest

from internvl3_mlx.errors import DataError
from internvl3_mlx.training.dataloader import prefetch

PATIENCE_S = 20


def test_items_keep_their_order():
    assert [*prefetch(iter(range(50)))] == [*range(50)]
    assert [*prefetch(iter(()))] == []
    assert [*prefetch(iter([None, 0, None]))] == [None, 0, None]


def test_the_next_items_are_made_in_advance():
    made, ready = [], threading.Event()

    def items():
        for n in range(9):
            made.append(n)
            if n == 2:
                ready.set()
            yield n

    read = prefetch(items(), depth=2)
    assert next(read) == 0
    assert ready.wait(PATIENCE_S)
    assert max(made) <= 3  # two wait, and one is held
    assert [*read] == [*range(1, 9)]


def test_an_error_is_raised_after_the_items_before_it():
    def items():
        yield 1
        raise DataError("rows.jsonl:2: not JSON")

    read = prefetch(items())
    assert next(read) == 1
    with pytest.raises(DataError, match="rows.jsonl:2"):
        next(read)


def test_the_thread_ends_when_the_reader_is_closed():
    before = threading.active_count()
    read = prefetch(iter(int, 1))  # endless zeros
    next(read)
    read.close()
    deadline = time.monotonic() + PATIENCE_S
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
