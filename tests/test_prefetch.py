"""Prefetching: the same items in the same order, and no thread left behind."""

import threading
import time

import pytest

from internvl3_mlx.errors import DataError
from internvl3_mlx.prefetch import map_ahead, prefetch

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


def test_a_generator_is_closed_on_its_own_thread_when_the_reader_leaves():
    closed, threads = threading.Event(), []

    def items():
        try:
            while True:
                threads.append(threading.get_ident())
                yield 1
        finally:
            threads.append(threading.get_ident())
            closed.set()

    read, held = prefetch(made := items()), made  # held: nothing but closing it ends it
    next(read)
    read.close()
    assert closed.wait(PATIENCE_S)
    assert {*threads} == {threads[0]} != {threading.get_ident()}
    assert next(held, None) is None


def test_a_function_is_mapped_in_order_on_another_thread():
    here = threading.get_ident()
    found = [*map_ahead(lambda n: (n * n, threading.get_ident()), range(20), ahead=3)]
    assert [square for square, _ in found] == [n * n for n in range(20)]
    assert here not in {thread for _, thread in found}
    assert [*map_ahead(str, ())] == []


def test_the_next_item_is_worked_on_while_this_one_is_used_and_no_other():
    begun, second = [], threading.Event()

    def work(n):
        begun.append(n)
        if n == 1:
            second.set()
        return n

    read = map_ahead(work, iter(range(9)))
    assert next(read) == 0
    assert second.wait(PATIENCE_S)
    time.sleep(0.05)
    assert begun == [0, 1]
    assert [*read] == [*range(1, 9)]


def test_items_are_read_in_the_readers_thread():
    threads = set()

    def items():
        for n in range(4):
            threads.add(threading.get_ident())
            yield n

    assert [*map_ahead(str, items())] == ["0", "1", "2", "3"]
    assert threads == {threading.get_ident()}


def test_an_error_of_the_function_is_raised_in_the_place_of_its_item():
    read = map_ahead(lambda n: 6 // n, [3, 0, 2])
    assert next(read) == 2
    with pytest.raises(ZeroDivisionError):
        next(read)


def test_a_reader_that_leaves_does_not_wait_and_leaves_no_thread():
    before, gate = threading.active_count(), threading.Event()
    done = []

    def work(n):
        if n:
            gate.wait(PATIENCE_S)
        done.append(n)
        return n

    read = map_ahead(work, range(9), ahead=4)
    assert next(read) == 0
    read.close()  # while 1 is worked on
    gate.set()
    deadline = time.monotonic() + PATIENCE_S
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before  # one of another test may have ended
    assert done in ([0], [0, 1])
