"""Many clients: isolation, reuse, cancellation, refusals."""

import asyncio
import time
from dataclasses import replace

import pytest
from fixtures.inputs import random_image
from fixtures.serving import (
    ASKED,
    CAT,
    DOG,
    WIDE,
    Reply,
    ask,
    ask_all,
    assistant,
    question,
    request_of,
    running_engine,
    user,
)

from internvl3_mlx import UserError
from internvl3_mlx.generation import decode_batch
from internvl3_mlx.generation.context_budget import kv_nbytes_per_token
from internvl3_mlx.models.internvl import InternVL, tiles_per_chunk
from internvl3_mlx.serving.memory_budget import request_nbytes
from internvl3_mlx.serving.prefill_task import PrefillTask
from internvl3_mlx.serving.requests import (
    ContextTooLong,
    InvalidRequest,
    QueueFull,
    RequestTooLarge,
    TextDelta,
    UnknownModel,
)


def test_1000_alternating_requests_never_get_the_answer_about_the_other_image(vlm):
    images = [CAT, DOG]
    wanted = [vlm.ask(ASKED, [image], max_tokens=2).token_ids for image in images]
    assert wanted[0] != wanted[1]
    asked = [question(images[n % 2], ASKED, max_tokens=2) for n in range(1000)]

    async def in_groups(engine):
        found = []
        for start in range(0, 1000, 50):
            group = [ask(engine, request) for request in asked[start : start + 50]]
            found += await asyncio.gather(*group)
        return found

    with running_engine(vlm) as engine:
        found = asyncio.run(in_groups(engine))
        metrics = engine.metrics()
    assert [reply.token_ids for reply in found] == wanted * 500
    assert metrics.image_features_computed == 2
    assert metrics.finished == {"length": 1000}


def test_a_second_turn_reads_no_image_and_only_its_own_tokens(vlm, monkeypatch):
    encoded = []
    encode = InternVL.encode_tiles
    monkeypatch.setattr(
        InternVL, "encode_tiles", lambda self, tiles: encoded.append(1) or encode(self, tiles)
    )
    first = user(WIDE, ASKED)
    with running_engine(vlm) as engine:
        [one] = ask_all(engine, [request_of(first, max_tokens=8)])
        looked = len(encoded)
        messages = [first, assistant(one.text), user("And what else?")]
        [two] = ask_all(engine, [request_of(*messages, max_tokens=8)])
        assert len(encoded) == looked > 1
        assert two.read.usage.cached_tokens >= one.read.usage.prompt_tokens
        metrics = engine.metrics()
    assert metrics.image_features_reused == 1
    with running_engine(vlm) as fresh:
        [again] = ask_all(fresh, [request_of(*messages, max_tokens=8)])
    assert again.read.usage.cached_tokens == 0
    assert again.token_ids == two.token_ids


def test_titles_and_tags_leave_a_conversation_cached(vlm):
    first = user(WIDE, ASKED)
    with running_engine(vlm, prefix_cache_nbytes=1_500_000) as engine:
        [one] = ask_all(engine, [request_of(first, max_tokens=8)])
        others = [question(f"Give a title, {n}: " + "word " * 60, max_tokens=2) for n in range(8)]
        ask_all(engine, [*others, question("x " * 40, max_tokens=2, housekeeping=True)])
        assert engine.metrics().prefix_cache_nbytes <= 1_500_000
        messages = [first, assistant(one.text), user("More?")]
        [two] = ask_all(engine, [request_of(*messages, max_tokens=2)])
    assert two.read.usage.cached_tokens >= one.read.usage.prompt_tokens


@pytest.mark.parametrize("change", ["v2pe_delta", "image", "system"])
def test_what_was_read_in_another_way_is_not_reused(vlm, change):
    changed = {
        "v2pe_delta": question(CAT, ASKED, max_tokens=4, v2pe_delta="1/4"),
        "image": question(DOG, ASKED, max_tokens=4),
        "system": question(CAT, ASKED, max_tokens=4, system="Be brief."),
    }[change]
    with running_engine(vlm) as engine:
        [first] = ask_all(engine, [question(CAT, ASKED, max_tokens=4)])
        [second] = ask_all(engine, [changed])
    assert second.read.usage.cached_tokens < first.read.usage.prompt_tokens - 10
    with running_engine(vlm) as fresh:
        [alone] = ask_all(fresh, [changed])
    assert second.token_ids == alone.token_ids


def test_decoding_goes_on_while_another_prompt_of_13_tiles_is_read(vlm, monkeypatch):
    """Between two pieces of the long prompt, the short answer gets a token."""
    big = random_image(56 * 4 + 3, 56 * 3, 5)
    steps, spans = [], {}
    step, run = decode_batch.DecodeBatch.step, PrefillTask.run

    def counted_run(task):
        begun = len(steps)
        for piece in run(task):
            spans.setdefault(id(task.queued), []).append(len(steps) - begun)
            yield piece

    monkeypatch.setattr(decode_batch.DecodeBatch, "step", lambda b: steps.append(1) or step(b))
    monkeypatch.setattr(PrefillTask, "run", counted_run)

    async def both(engine):
        first = await engine.submit(question("Count.", max_tokens=60))
        async for event in first:
            if isinstance(event, TextDelta):
                break
        second = await ask(engine, question(big, ASKED, max_tokens=2))
        async for _ in first:
            pass
        return second

    with running_engine(vlm) as engine:
        second = asyncio.run(both(engine))
    assert second.read.usage.images[0].tiles == 13
    pieces = [*spans.values()][-1]
    assert len(pieces) >= -(-13 // tiles_per_chunk()) + 1
    assert pieces[-1] >= len(pieces) - 2  # a decode step for every piece


def test_a_short_prompt_does_not_wait_for_a_long_one_before_it(vlm):
    big = random_image(56 * 4 + 3, 56 * 3, 6)

    async def both(engine):
        started = time.perf_counter()
        ends = {}

        async def timed(name, request):
            await ask(engine, request)
            ends[name] = time.perf_counter() - started

        long = asyncio.ensure_future(timed("long", question(big, ASKED, max_tokens=1)))
        await asyncio.sleep(0)
        await asyncio.gather(long, timed("short", question("Hi", max_tokens=1)))
        return [*ends]

    with running_engine(vlm) as engine:
        ask_all(engine, [question("warm", max_tokens=1)])
        assert asyncio.run(both(engine)) == ["short", "long"]


def test_a_client_that_leaves_frees_its_place_within_a_token(vlm):
    async def leave(engine):
        stream = await engine.submit(question(CAT, ASKED, max_tokens=4000))
        async for event in stream:
            if isinstance(event, TextDelta):
                break
        before = engine.metrics().completion_tokens
        await stream.aclose()
        while engine.status().running:
            await asyncio.sleep(0.001)
        return engine.metrics().completion_tokens - before

    with running_engine(vlm) as engine:
        assert asyncio.run(leave(engine)) < 200  # of 4000
        assert engine.metrics().finished == {"cancelled": 1}
        [reply] = ask_all(engine, [question(DOG, ASKED, max_tokens=2)])
    assert isinstance(reply, Reply)


def test_a_stream_that_is_dropped_counts_as_left(vlm):
    async def drop(engine):
        stream = await engine.submit(question(CAT, ASKED, max_tokens=4000))
        await stream.__anext__()
        del stream
        while engine.status().running or engine.status().prefilling:
            await asyncio.sleep(0.001)

    with running_engine(vlm) as engine:
        asyncio.run(asyncio.wait_for(drop(engine), 20))
        assert engine.metrics().finished == {"cancelled": 1}


def test_beyond_its_length_the_queue_refuses(vlm):
    with running_engine(vlm, max_batch=1, max_prefills=1, max_waiting=3) as engine:
        found = ask_all(engine, [question("Hi", max_tokens=30) for _ in range(12)])
        refused = [one for one in found if isinstance(one, QueueFull)]
        assert refused
        assert all(one.status == 503 and one.retry_after_s >= 1 for one in refused)
        assert len([one for one in found if isinstance(one, Reply)]) == 12 - len(refused)
        assert engine.metrics().rejected == {"QueueFull": len(refused)}
        [reply] = ask_all(engine, [question("Hi", max_tokens=1)])
    assert isinstance(reply, Reply)


def test_without_a_queue_requests_that_can_begin_are_taken(vlm):
    with running_engine(vlm, max_batch=2, max_waiting=0) as engine:
        found = ask_all(engine, [question("Hi", max_tokens=20) for _ in range(5)])
    assert [type(one) for one in found].count(QueueFull) >= 3
    assert [type(one) for one in found].count(Reply) >= 1


def test_clients_take_turns(vlm):
    order = []

    async def one(engine, client, n):
        await ask(engine, question(f"{n}", max_tokens=2, client=client))
        order.append(client)

    async def everybody(engine):
        many = [one(engine, "greedy", n) for n in range(6)]
        await asyncio.gather(*many, one(engine, "modest", 7))

    with running_engine(vlm, max_batch=1, max_prefills=1) as engine:
        asyncio.run(everybody(engine))
    assert order.index("modest") <= 3


def test_what_can_never_fit_is_refused_before_anything_is_computed(vlm):
    weights = vlm.runner.weights_nbytes
    with running_engine(vlm, memory_nbytes=weights + 2_000_000) as engine:
        found = ask_all(
            engine,
            [
                question(WIDE, ASKED, max_tokens=4000),
                question("Hi", max_tokens=20),
                question("Hi", max_tokens=300, n=8),
            ],
        )
        metrics = engine.metrics()
    assert [type(one) for one in found] == [RequestTooLarge, Reply, RequestTooLarge]
    assert found[0].status == 413
    assert "max_tiles" in str(found[0])
    assert metrics.image_features_computed == 0


@pytest.mark.parametrize(("missing", "outcome"), [(0, Reply), (1, RequestTooLarge)])
def test_answers_to_one_prompt_need_it_once(vlm, missing, outcome):
    inputs = vlm.prepare_inputs(ASKED, [WIDE])
    one = request_nbytes(vlm.runner, question(WIDE, ASKED), inputs, 4)
    tail = 4 * kv_nbytes_per_token(vlm.model, vlm.conversation().generation_config)
    limit = vlm.runner.weights_nbytes + one + 7 * tail - missing
    with running_engine(vlm, memory_nbytes=limit) as engine:
        [found] = ask_all(engine, [question(WIDE, ASKED, max_tokens=4, n=8)])
    assert type(found) is outcome


def test_what_does_not_fit_beside_others_waits(vlm):
    weights = vlm.runner.weights_nbytes
    asked = [question("Hi " * 20, max_tokens=100) for _ in range(6)]
    with running_engine(vlm, memory_nbytes=weights + 3_000_000) as engine:
        found = ask_all(engine, asked)
    assert [type(one) for one in found] == [Reply] * 6
    assert len({tuple(reply.token_ids) for reply in found}) == 1


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        (question("Hi", model="other"), UnknownModel),
        (question("Hi", n=99), InvalidRequest),
        (question("Hi", frequency_penalty=3), InvalidRequest),
        (question("Hi", logit_bias={10**9: 1.0}), InvalidRequest),
        (question("Hi", regex="("), InvalidRequest),
        (question("Hi", continue_final_message=True), InvalidRequest),
        (question("word " * 20_000), ContextTooLong),
        (request_of(assistant("Hi")), InvalidRequest),
        (replace(question("Hi"), messages=()), InvalidRequest),
    ],
)
def test_bad_requests_are_refused_in_a_line(vlm, request_, kind):
    with running_engine(vlm) as engine:
        [found] = ask_all(engine, [request_])
    assert type(found) is kind
    assert "\n" not in str(found)
    assert isinstance(found, UserError)


def test_a_damaged_image_is_refused(vlm):
    from internvl3_mlx.serving.requests import AnswerRequest, ChatMessage, ImagePart

    broken = AnswerRequest((ChatMessage("user", (ImagePart(b"\x89PNG\r\n\x1a\nrest"),)),))
    with running_engine(vlm) as engine:
        found, other = ask_all(engine, [broken, question("Hi", max_tokens=1)])
    assert type(found) is InvalidRequest
    assert isinstance(other, Reply)
