"""The stages of a model are measured one by one and leave the model as it was."""

import pytest
from fixtures.loaded_models import bare_model

from internvl3_mlx.models.cache import bucket_length
from internvl3_mlx.profiling import stages, timing
from internvl3_mlx.profiling.stages import StageBenchmark
from internvl3_mlx.profiling.suite import BenchmarkSuite


@pytest.fixture(autouse=True)
def _once(monkeypatch):
    monkeypatch.setattr(timing, "MIN_RUN_SECONDS", 0.0)


@pytest.fixture(scope="module")
def model():
    return bare_model("300m", folded=True, head_dim=64)[0]


def test_every_stage_is_measured_at_every_context(model):
    stages = StageBenchmark(model, [5, 40], tiles=(1, 3), chunk=7, runs=1)
    found = [task.measure() for task in stages.tasks()]
    assert [(f.group, f.name, f.context) for f in found] == [
        ("tower", "1 tile", 0),
        ("tower", "3 tiles", 0),
        ("prefill", "7 tokens", 5),
        ("prefill", "7 tokens", 40),
        *[("decode", f"{bits}-bit cache", context) for bits in (16, 8, 4) for context in (5, 40)],
        ("decode", "16-bit cache, 8x room", 5),
    ]
    assert all(figure.seconds > 0 for figure in found)


def test_measuring_does_not_lengthen_the_context(model):
    stages = StageBenchmark(model, [9], chunk=4, runs=2)
    engine = stages.filled_engine(9, 8)
    caches = []
    make = StageBenchmark.filled_engine

    def kept(self, context, bits, room=1):
        caches.append(make(self, context, bits, room))
        return caches[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageBenchmark, "filled_engine", kept)
        stages.measure_decode(9, 8)
        stages.measure_prefill(9)
    assert [one.num_cached for one in caches] == [9, 9]
    assert {layer.offset for one in caches for layer in one.cache} == {9}
    assert engine.kv_quantization.bits == 8


def test_equal_steps_differ_in_the_room_of_their_buffers_alone(model):
    stages = StageBenchmark(model, [700], runs=1)
    near, far = (stages.filled_engine(700, 16, room) for room in (1, 8))
    assert {layer.offset for one in (near, far) for layer in one.cache} == {700}
    tokens = [{layer.arrays[0].shape[-2] for layer in one.cache} for one in (near, far)]
    assert tokens == [{768}, {bucket_length(8 * 700)}]


def test_a_cache_too_large_for_the_memory_is_skipped_with_a_reason(model, monkeypatch):
    monkeypatch.setattr(stages, "gpu_memory_limit", lambda: 1000)
    measured = StageBenchmark(model, [64], chunk=7, runs=1)
    for figure in (measured.measure_prefill(64), measured.measure_decode(64, 8)):
        assert figure.seconds is None
        assert figure.why == "the cache would take more than half of the memory"


def test_measurements_remain_after_an_interrupt(model):
    run = BenchmarkSuite(model, [33, 3], quick=True)
    assert run.contexts == [3, 33]
    steps = run.run()
    names = [next(steps) for _ in range(4)]
    steps.close()
    assert names[0] == "the limits of the machine"
    assert names[1] == "kernels, 1b, 16-bit cache, 3 tokens"
    assert [figure.context for figure in run.measurements] == [3, 33]
    assert run.limits is not None
    assert len(run) > 4


def test_default_contexts_suit_the_device(model):
    assert len(BenchmarkSuite(model).contexts) > len(BenchmarkSuite(model, quick=True).contexts) > 0
