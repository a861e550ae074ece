"""Faults stay with one request, and the engine ends in order."""

import asyncio
import threading
import time

import mlx.core as mx
import pytest
from fixtures.serving import (
    ASKED,
    CAT,
    DOG,
    WIDE,
    ask,
    ask_all,
    question,
    running_engine,
)

from internvl3_mlx.errors import GPUError, NumericError
from internvl3_mlx.generation import decode_batch
from internvl3_mlx.serving import prompt_inputs, running_answer
from internvl3_mlx.serving.engine import Engine
from internvl3_mlx.serving.prefill_task import PrefillTask
from internvl3_mlx.serving.requests import (
    AnswerFailed,
    EngineStopped,
)
from internvl3_mlx.serving.scheduler import Scheduler
from internvl3_mlx.serving.settings import EngineSettings

STAGES = {
    "decode image": (prompt_inputs, "read_media"),
    "encode image": (PrefillTask, "encode_image"),
    "read prompt": (PrefillTask, "open"),
    "join": (PrefillTask, "result"),
    "detokenize": (running_answer.RunningAnswer, "accept"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_fault_at_any_stage_ends_one_request_alone(vlm, monkeypatch, stage):
    place, name = STAGES[stage]
    whole, seed = getattr(place, name), 77
    calls = []

    def concerns(argument):
        queued = getattr(argument, "queued", None)
        config = getattr(getattr(queued, "request", None), "config", argument)
        return getattr(config, "seed", None) == seed

    def faulty(*args, **options):
        if any(concerns(argument) for argument in args):
            calls.append(1)
            if stage != "detokenize" or len(calls) > 2:
                raise ZeroDivisionError("division by zero")
        return whole(*args, **options)

    wanted = [vlm.ask(ASKED, [image], max_tokens=12).token_ids for image in (CAT, DOG)]
    monkeypatch.setattr(place, name, faulty)
    asked = [question(image, ASKED, max_tokens=12) for image in (CAT, DOG)]
    bad = question(WIDE, ASKED, max_tokens=12, seed=seed, temperature=1.0)
    with running_engine(vlm) as engine:
        one, failed, two = ask_all(engine, [asked[0], bad, asked[1]])
        assert calls
        assert isinstance(failed, AnswerFailed)
        assert isinstance(failed.__cause__, ZeroDivisionError)
        assert [one.token_ids, two.token_ids] == wanted
        [again] = ask_all(engine, [asked[0]])
        assert again.token_ids == wanted[0]
        assert engine.status().running == engine.status().prefilling == 0


OUT_OF_MEMORY = "[METAL] Command buffer execution failed: Insufficient Memory"


@pytest.mark.parametrize("sampled", [False, True])
def test_a_gpu_error_ends_the_largest_request_and_the_others_go_on(vlm, monkeypatch, sampled):
    options = [
        {"temperature": 1.0, "seed": n, "repetition_penalty": 1.2} if sampled else {}
        for n in range(2)
    ]
    small = [
        question(image, ASKED, max_tokens=20, **one)
        for image, one in zip((CAT, DOG), options, strict=True)
    ]
    wanted = [
        vlm.ask(ASKED, [image], max_tokens=20, **one).token_ids
        for image, one in zip((CAT, DOG), options, strict=True)
    ]
    step, failed = decode_batch.DecodeBatch.advance, []

    def out_of_memory(batch, chosen):
        answers = batch.answers.values()
        if len(answers) == 3 and max(len(one.generated_ids) for one in answers) > 5:
            failed.append(1)
            raise RuntimeError(OUT_OF_MEMORY)
        return step(batch, chosen)

    monkeypatch.setattr(decode_batch.DecodeBatch, "advance", out_of_memory)
    with running_engine(vlm) as engine:
        one, large, two = ask_all(
            engine, [small[0], question(WIDE, ASKED, max_tokens=20), small[1]]
        )
    assert failed == [1]
    assert isinstance(large, GPUError)
    assert "ran out of memory" in str(large)
    assert [one.token_ids, two.token_ids] == wanted
    assert one.text == "".join(delta.text for delta in one.deltas)


def test_numbers_that_are_not_finite_end_one_answer(vlm, monkeypatch):
    choose = decode_batch.choose_tokens

    def spoiled(rows, answers, logits, shard):
        bad = [answer.queued.request.config.seed == 77 for answer in answers]
        return choose(rows, answers, mx.where(mx.array(bad)[:, None], mx.nan, logits), shard)

    monkeypatch.setattr(decode_batch, "choose_tokens", spoiled)
    with running_engine(vlm) as engine:
        found, other = ask_all(
            engine,
            [question(CAT, ASKED, max_tokens=4, seed=77), question(DOG, ASKED, max_tokens=4)],
        )
    assert isinstance(found, NumericError)
    assert len(other.token_ids) == 4


def test_stopping_lets_answers_end_and_refuses_new_ones(vlm):
    async def stop_amid(engine, grace, tokens):
        stream = await engine.submit(question("Hi", max_tokens=tokens))
        await stream.__anext__()
        await stream.__anext__()
        stopping = asyncio.ensure_future(asyncio.to_thread(engine.stop, grace))
        events = [event async for event in stream]
        await stopping
        with pytest.raises(EngineStopped):
            await engine.submit(question("Hi"))
        return events[-1]

    with running_engine(vlm) as engine:
        assert asyncio.run(stop_amid(engine, 30, 40)).usage.completion_tokens == 40
    with running_engine(vlm) as engine:
        cut = asyncio.run(stop_amid(engine, 0.05, 4000))
    assert cut.finish_reason == "length"
    assert 1 < cut.usage.completion_tokens < 4000
    assert not engine.status().alive


def test_a_fault_of_the_engine_itself_ends_what_runs_and_nothing_after(vlm, monkeypatch):
    admit = Scheduler.admit

    def faulty(scheduler):
        if len(scheduler.live) == 3:
            monkeypatch.setattr(Scheduler, "admit", admit)
            raise ZeroDivisionError
        admit(scheduler)

    monkeypatch.setattr(Scheduler, "admit", faulty)
    with running_engine(vlm) as engine:
        found = ask_all(engine, [question(WIDE, ASKED, max_tokens=2000) for _ in range(3)])
        assert [type(one) for one in found] == [AnswerFailed] * 3
        [again] = ask_all(engine, [question(WIDE, ASKED, max_tokens=3)])
        status = engine.status()
    assert again.token_ids == vlm.ask(ASKED, [WIDE], max_tokens=3).token_ids
    assert (status.running, status.prefilling, status.waiting, status.alive) == (0, 0, 0, True)


def test_a_client_that_leaves_while_a_model_is_loaded_harms_nobody(vlm):
    loading = threading.Event()

    def slow_loader(source, *_):
        loading.set()
        time.sleep(0.2)
        return vlm.runner

    async def leave(engine):
        gone = [asyncio.ensure_future(engine.submit(question("Hi"))) for _ in range(3)]
        await asyncio.to_thread(loading.wait)
        for one in gone:
            one.cancel()
        return await ask(engine, question("Hi", max_tokens=2))

    engine = Engine(EngineSettings({"slow": "slow"}), slow_loader)
    engine.start()
    reply = asyncio.run(leave(engine))
    assert len(reply.token_ids) == 2
    assert engine.status().waiting == 0
    engine.stop(0)
