"""Memory while a model works: what is wired, what is given back, and that all paths do both."""

import math
from bisect import bisect_left

import mlx.core as mx
import pytest
from fixtures.pretend_gpu import GB, pretend_metal
from fixtures.records import write_image
from fixtures.train_sessions import small_session, small_setup, write_data

from internvl3_mlx import device, load, memory
from internvl3_mlx.memory import MemoryNeed, tight_memory_warning, working_memory
from internvl3_mlx.models import cache as kv_cache
from internvl3_mlx.training.run import run_session
from internvl3_mlx.training.session import open_train_session

PAGE = 16384
QUESTION = "What is this?"


@pytest.fixture(scope="module")
def vlm():
    return load("demo")


@pytest.fixture
def image(tmp_path):
    write_image(tmp_path / "noise.png", 90, 60, 3)
    return tmp_path / "noise.png"


@pytest.mark.parametrize(
    ("weights", "cache", "recommended", "wired"),
    [
        (3 * GB, 2 * GB, 12 * GB, 6 * GB),  # with a headroom of 1 GB
        (11 * GB, 2 * GB, 12 * GB, 10 * GB),  # a Mac of 16 GB: never all that is recommended
        (90 * GB, 20 * GB, 100 * GB, 90 * GB),
        (1 * GB, 0, 1 * GB, 0),
    ],
)
def test_what_is_needed_is_wired_but_never_all_that_is_recommended(
    monkeypatch, weights, cache, recommended, wired
):
    calls = pretend_metal(monkeypatch, recommended, wired=7)
    with working_memory(MemoryNeed(weights, cache)):
        assert calls.wired == [wired]
    assert calls.wired == [wired, 7]
    assert calls.clears == 1


def test_overlapping_tasks_share_weights_and_restore_the_limit_after_the_last(monkeypatch):
    calls = pretend_metal(monkeypatch, 100 * GB, wired=5)
    first = working_memory(MemoryNeed(10 * GB, 1 * GB, owner=1))
    second = working_memory(MemoryNeed(10 * GB, 2 * GB, owner=1))
    other = working_memory(MemoryNeed(20 * GB, 3 * GB, owner=2))
    for task in (first, second, other):
        task.__enter__()
    for task in (first, other, second):
        task.__exit__(None, None, None)
    assert calls.wired == [12 * GB, 14 * GB, 37 * GB, 36 * GB, 13 * GB, 5]


def test_the_limit_is_restored_even_if_the_gpu_cannot_be_waited_for(monkeypatch):
    calls = pretend_metal(monkeypatch, wired=3)

    def fail():
        raise RuntimeError("[METAL] Command buffer execution failed")

    monkeypatch.setattr(mx, "synchronize", fail)
    with pytest.raises(RuntimeError, match="METAL"), working_memory(MemoryNeed(GB)):
        pass
    assert calls.limit == 3


def test_a_cpu_wires_nothing(monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    asked: list[int] = []
    monkeypatch.setattr(mx, "set_wired_limit", asked.append)
    with working_memory(MemoryNeed(GB)):
        pass
    assert asked == []


def test_the_gpu_is_asked_whatever_the_default_device_is(monkeypatch):
    pretend_metal(monkeypatch, 12 * GB)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert device.gpu_memory_limit() == 12 * GB


def test_weights_that_barely_fit_are_mentioned_once_at_loading(monkeypatch):
    pretend_metal(monkeypatch, 10 * GB)
    assert tight_memory_warning(9 * GB) is None
    assert "9.1 GB of the 10.0 GB" in tight_memory_warning(9_100_000_000)
    pretend_metal(monkeypatch, 5_000_000)  # less than the demo has
    notes = []
    load("demo", notify=notes.append)
    assert [note for note in notes if "GB that macOS recommends" in note] == notes[-1:]


def answer_paths(vlm, image):
    conversation = vlm.conversation(max_tokens=5)
    return {
        "ask": lambda: vlm.ask(QUESTION, image, max_tokens=5),
        "conversation": lambda: conversation.ask(QUESTION, image),
        "batch": lambda: list(vlm.ask_each(QUESTION, [image] * 3, batch_size=2, max_tokens=5)),
        "samples": lambda: vlm.ask_many(QUESTION, image, n=3, temperature=1.0, max_tokens=5),
        "lookup": lambda: vlm.ask(QUESTION, image, lookup=True, max_tokens=5),
        "draft": lambda: vlm.ask(QUESTION, image, draft_model="demo", max_tokens=5),
    }


@pytest.mark.parametrize("path", ["ask", "conversation", "batch", "samples", "lookup", "draft"])
def test_every_way_to_answer_wires_clears_and_restores(monkeypatch, vlm, image, path):
    calls = pretend_metal(monkeypatch, wired=11)
    answer_paths(vlm, image)[path]()
    assert max(calls.wired) > vlm.runner.weights_nbytes + memory.HEADROOM
    assert calls.limit == 11
    assert calls.clears >= 2  # after the prompt, and at the end


def test_the_limit_holds_while_chunks_come_and_an_abandoned_stream_restores_it(
    monkeypatch, vlm, image
):
    calls = pretend_metal(monkeypatch, wired=11)
    stream = vlm.stream(QUESTION, image, max_tokens=30)
    next(stream)
    assert calls.limit > 11
    del stream
    assert calls.limit == 11


def test_an_error_restores_the_limit(monkeypatch, vlm, image):
    calls = pretend_metal(monkeypatch, wired=11)
    monkeypatch.setattr(mx, "argmax", None)
    with pytest.raises(TypeError):
        vlm.ask(QUESTION, image, max_tokens=5)
    assert calls.limit == 11


def test_training_wires_less_than_all_and_restores_both_limits(monkeypatch, tmp_path):
    write_data(tmp_path / "data", 2)
    session = small_session(tmp_path, iters=1)
    calls = pretend_metal(monkeypatch, wired=11)
    list(run_session(session))
    assert 11 < max(calls.wired) <= 10 * GB
    assert calls.limit == 11
    assert calls.clears >= 1


@pytest.mark.parametrize(
    ("settings", "pairs"),
    [
        ({"method": "distill", "teacher": "demo", "distill_top_k": 4}, False),
        ({"method": "mpo", "cache_reference": True, "train": "lora,mlp1"}, True),
    ],
)
def test_what_is_computed_before_the_updates_is_wired_too(monkeypatch, tmp_path, settings, pairs):
    write_data(tmp_path / "data", 2, pairs=pairs)
    monkeypatch.setenv("INTERNVL3_CACHE", str(tmp_path / "cache"))
    setup = small_setup(tmp_path, iters=1, **settings)
    calls = pretend_metal(monkeypatch, wired=11)
    cached, limits = mx.set_cache_limit(1), []
    mx.set_cache_limit(cached)
    for _ in open_train_session(setup):
        limits.append((calls.limit > 11, mx.set_cache_limit(cached) == 12 * GB // 8))
    assert set(limits) == {(True, True)}
    assert (calls.limit, mx.set_cache_limit(cached)) == (11, cached)


class ReplayedBufferCache:
    """MLX's cache of freed buffers: one serves a request of at least its size less two pages."""

    def __init__(self):
        self.sizes = []

    def allocate(self, size):
        at = bisect_left(self.sizes, size)
        if at < len(self.sizes) and self.sizes[at] < min(2 * size, size + 2 * PAGE):
            del self.sizes[at]

    def free(self, size):
        self.sizes.insert(bisect_left(self.sizes, size), size)

    def clear(self):
        self.sizes.clear()


def test_a_long_answer_leaves_at_most_one_cache_behind(monkeypatch, vlm):
    buffers, grow = ReplayedBufferCache(), kv_cache.grow
    most = 0

    def recorded(buffer, new, needed, capacity):
        nonlocal most
        grown = grow(buffer, new, needed, capacity)
        if grown is not buffer:
            buffers.allocate(grown.nbytes)
            if buffer is not None:
                buffers.free(buffer.nbytes)
            most = max(most, sum(buffers.sizes))
        return grown

    monkeypatch.setattr(kv_cache, "grow", recorded)
    monkeypatch.setattr(mx, "clear_cache", buffers.clear)
    conversation = vlm.conversation(max_tokens=4 * kv_cache.GROWTH_STEP + 99)
    monkeypatch.setattr(vlm.tokenizer, "stop_ids", frozenset())
    answer = conversation.ask(QUESTION)
    store = conversation.prompt_cache.nbytes
    assert answer.usage.completion_tokens > 4 * kv_cache.GROWTH_STEP
    assert most <= store
    assert buffers.sizes == []


def test_figures_say_what_is_held_and_not_only_what_is_in_use(monkeypatch, vlm):
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 3 * GB)
    answer = vlm.ask(QUESTION, max_tokens=2)
    assert answer.held_memory_gb > 3 > answer.peak_memory_gb
    assert math.isclose(answer.to_dict()["held_memory_gb"], answer.held_memory_gb, abs_tol=1e-4)
