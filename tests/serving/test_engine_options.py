"""What a request may ask for, and what an engine keeps between requests and between runs."""

import asyncio
import gc
import math
import time

import mlx.core as mx
import numpy as np
import pytest
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.serving import (
    ask,
    ask_all,
    assistant,
    question,
    request_of,
    running_engine,
    user,
)
from fixtures.tiny import Recipe
from fixtures.tolerances import TOLERANCE

from internvl3_mlx import load
from internvl3_mlx.models.cache_kind import format_of
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.models.ragged_cache import RaggedBatch
from internvl3_mlx.prompt.reasoning import R1_SYSTEM_PROMPT
from internvl3_mlx.serving.engine import Engine, ModelSource, model_sources
from internvl3_mlx.serving.queued_request import QueuedRequest
from internvl3_mlx.serving.requests import InvalidRequest, UnknownModel
from internvl3_mlx.serving.settings import EngineSettings

IMAGE, WIDE = random_image(60, 60, 1), random_image(200, 60, 3)
ASKED = "What is it?"


@pytest.fixture(scope="module")
def other():
    return load(str(tiny(Recipe(style="6b")).folder))


@pytest.fixture
def encoded(monkeypatch):
    """Count the calls of the vision model."""
    calls = []
    encode = InternVL.encode_tiles
    monkeypatch.setattr(
        InternVL, "encode_tiles", lambda self, tiles: calls.append(1) or encode(self, tiles)
    )
    return calls


def next_logits(vlm, ids):
    """Return the logits of every token of a text prompt, (L, vocab) float64."""
    return np.array(vlm.model(mx.array([ids]))[0].astype(mx.float32), dtype=np.float64)


def test_log_probabilities_are_the_softmax_of_the_logits(vlm):
    prompt = vlm.prepare_inputs("Hi", system="")
    with running_engine(vlm) as engine:
        [reply] = ask_all(
            engine,
            [question("Hi", system="", max_tokens=5, logprobs=True, top_logprobs=4)],
        )
    ids = reply.token_ids
    logits = next_logits(vlm, [*prompt.token_ids, *ids])[len(prompt.token_ids) - 1 : -1]
    wanted = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
    wanted -= logits.max(1, keepdims=True)
    found = reply.done[0].logprobs
    assert [one.token_id for one in found] == ids
    for row, one in zip(wanted, found, strict=True):
        assert one.logprob == pytest.approx(row[one.token_id], abs=TOLERANCE)
        assert [top.token_id for top in one.top] == np.argsort(-row)[:4].tolist()
        assert one.top[0].logprob == pytest.approx(row.max(), abs=TOLERANCE)
    streamed = [one for delta in reply.deltas for one in delta.logprobs]
    assert tuple(streamed) == found


def test_penalties_and_biases_are_openai_s(vlm):
    options = {"system": "", "max_tokens": 12}
    penalties = {"frequency_penalty": 1.5, "presence_penalty": 1.0}
    prompt = vlm.prepare_inputs("Hi", system="").token_ids
    plain = vlm.ask("Hi", **options).token_ids
    wanted, counts = [], np.zeros(vlm.config.text.vocab_size)
    for _ in range(12):
        logits = next_logits(vlm, [*prompt, *wanted])[-1]
        logits[plain[0]] -= 50
        wanted.append(int(np.argmax(logits - 1.5 * counts - 1.0 * (counts > 0))))
        counts[wanted[-1]] += 1
    with running_engine(vlm) as engine:
        asked = question("Hi", **options, **penalties, logit_bias={plain[0]: -50.0})
        [reply, beside] = ask_all(engine, [asked, question("Hi", **options)])
    assert reply.token_ids == wanted
    assert beside.token_ids == plain


def test_an_answer_that_is_begun_is_continued(vlm):
    whole = vlm.ask(ASKED, [IMAGE], max_tokens=20)
    begun = whole.text[: len(whole.text) // 2]
    with running_engine(vlm) as engine:
        [reply] = ask_all(
            engine,
            [
                request_of(
                    user(IMAGE, ASKED),
                    assistant(begun),
                    max_tokens=6,
                    continue_final_message=True,
                )
            ],
        )
    inputs = vlm.prepare_inputs(ASKED, [IMAGE])
    prefix = vlm.tokenizer.encode_text(begun)
    assert reply.read.usage.prompt_tokens <= len(inputs.token_ids) + len(prefix)
    assert reply.read.usage.prompt_tokens > len(inputs.token_ids)


def test_thinking_takes_the_published_system_prompt(vlm):
    wanted = len(vlm.prepare_inputs("Hi", system=R1_SYSTEM_PROMPT).token_ids)
    with running_engine(vlm) as engine:
        thinking, plain, both = ask_all(
            engine,
            [
                question("Hi", think=True, max_tokens=2),
                question("Hi", max_tokens=2),
                question("Hi", think=True, choice=("a", "b")),
            ],
        )
    assert thinking.read.usage.prompt_tokens == wanted != plain.read.usage.prompt_tokens
    assert isinstance(both, InvalidRequest)


def test_the_best_of_several_has_the_highest_mean_log_probability(vlm):
    options = {"temperature": 1.0, "seed": 3, "max_tokens": 6}
    with running_engine(vlm) as engine:
        everything, best, refused = ask_all(
            engine,
            [
                question(IMAGE, ASKED, n=5, logprobs=True, **options),
                question(IMAGE, ASKED, n=2, best_of=5, **options),
                question(IMAGE, ASKED, best_of=5, max_tokens=2),
            ],
        )
    scores = {
        done.text: sum(one.logprob for one in done.logprobs) / len(done.logprobs)
        for done in everything.done
    }
    ranked = sorted(scores, key=lambda text: -scores[text])
    assert [done.text for done in best.done] == ranked[:2]
    assert best.done[0].score == pytest.approx(scores[ranked[0]], abs=TOLERANCE)
    assert best.done[0].logprobs == ()
    assert "".join(delta.text for delta in best.deltas if delta.index == 0) == ranked[0]
    assert isinstance(refused, InvalidRequest)


def test_a_critic_chooses_among_candidates(vlm):
    from internvl3_mlx.test_time_scaling.critic import open_critic

    options = {"temperature": 1.0, "seed": 3, "max_tokens": 6}
    with running_engine(vlm) as engine:
        everything, best, plain, refused = ask_all(
            engine,
            [
                question(IMAGE, ASKED, n=4, **options),
                question(IMAGE, ASKED, best_of=4, critic=vlm.name, **options),
                question(IMAGE, ASKED, max_tokens=20),
                question(IMAGE, ASKED, best_of=4, critic="x", **options),
            ],
        )
    assert isinstance(refused, UnknownModel)
    assert refused.parameter == "critic"
    session = open_critic(vlm.runner).open(ASKED, [IMAGE])
    scores = {done.text: session.score(done.text).score for done in everything.done}
    assert best.done[0].text == max(scores, key=scores.__getitem__)
    assert best.done[0].score == pytest.approx(max(scores.values()), abs=TOLERANCE)
    assert plain.token_ids == vlm.ask(ASKED, [IMAGE], max_tokens=20).token_ids


@pytest.mark.parametrize("kv_bits", [8, 4])
def test_quantized_caches_are_decoded_together_too(vlm, kv_bits):
    # chunks of one size: four bits of a random model tell rounding apart
    options = {"kv_bits": kv_bits, "kv_group_size": 32, "max_tokens": 8, "prefill_step_size": 512}
    images = [IMAGE, WIDE]
    wanted = [vlm.ask(ASKED, [image], **options).token_ids for image in images]
    asked = [question(image, ASKED, **options) for image in images]
    with running_engine(vlm) as engine:
        found = ask_all(engine, [*asked, question(WIDE, ASKED, max_tokens=8)])
        again = ask_all(engine, asked)
    assert [reply.token_ids for reply in found[:2]] == wanted
    assert found[2].token_ids == vlm.ask(ASKED, [WIDE], max_tokens=8).token_ids
    assert [reply.read.usage.cached_tokens > 0 for reply in again] == [True, True]
    assert kv_bits == 4 or [reply.token_ids for reply in again] == wanted


@pytest.fixture
def groups(monkeypatch):
    """Keep what kinds of groups every step of a batch has: answers, and tokens of their prompt."""
    seen, begin = [], RaggedBatch.begin_step

    def begin_step(self):
        seen.append([(len(one.rows), getattr(one, "prefix_length", 0)) for one in self.groups])
        begin(self)

    monkeypatch.setattr(RaggedBatch, "begin_step", begin_step)
    return seen


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_answers_to_one_prompt_share_its_keys(vlm, groups, kv_bits):
    options = {"kv_bits": kv_bits, "kv_group_size": 32, "max_tokens": 6, "temperature": 1.0}
    wanted = [vlm.ask(ASKED, [IMAGE], seed=3 + n, **options).token_ids for n in range(4)]
    with running_engine(vlm) as engine:
        [reply] = ask_all(engine, [question(IMAGE, ASKED, n=4, seed=3, **options)])
        [again] = ask_all(engine, [question(IMAGE, ASKED, n=2, seed=3, **options)])
    assert [reply.ids_of(n) for n in range(4)] == wanted
    assert [again.ids_of(n) for n in range(2)] == wanted[:2]
    assert again.read.usage.cached_tokens > 0
    prompt = reply.read.usage.prompt_tokens
    assert [(4, prompt)] in groups
    assert [(2, prompt)] in groups


def test_the_servers_bits_are_those_of_requests_that_have_none(vlm):
    wanted = vlm.ask(ASKED, [IMAGE], max_tokens=6, kv_bits=8).token_ids
    with running_engine(vlm, kv_bits=8) as engine:
        [reply] = ask_all(engine, [question(IMAGE, ASKED, max_tokens=6)])
        entries = engine.pool.prefixes.entries
        formats = {format_of(layer).bits for entry in entries for layer in entry.layers}
    assert reply.token_ids == wanted
    assert formats == {8}


@pytest.mark.parametrize("kv_bits", [None, 8, 4])
def test_requests_of_one_quantization_are_one_group(vlm, groups, kv_bits):
    options = {"kv_bits": kv_bits, "kv_group_size": 32, "max_tokens": 30}
    with running_engine(vlm) as engine:
        ask_all(engine, [question("Hi " * n, **options) for n in (2, 9, 30)])
    assert [(3, 0)] in groups


def test_features_on_disk_are_found_by_the_next_run(vlm, encoded, tmp_path):
    folder = tmp_path / "features"
    replies = []
    for _ in range(2):
        with running_engine(vlm, feature_folder=folder) as engine:
            replies += ask_all(engine, [question(WIDE, ASKED, max_tokens=4)])
            metrics = engine.metrics()
    assert replies[0].token_ids == replies[1].token_ids
    assert (metrics.image_features_computed, metrics.image_features_reused) == (0, 1)
    assert folder.stat().st_mode & 0o077 == 0


def test_features_of_another_model_or_of_damaged_files_are_computed_again(
    vlm, other, encoded, tmp_path
):
    with running_engine(vlm, feature_folder=tmp_path) as engine:
        [first] = ask_all(engine, [question(WIDE, ASKED, max_tokens=4)])
    looked = len(encoded)
    with running_engine(other, feature_folder=tmp_path) as engine:
        ask_all(engine, [question(WIDE, ASKED, max_tokens=4)])
    assert len(encoded) > looked
    for path in tmp_path.glob("*/*.safetensors"):
        path.write_bytes(path.read_bytes()[:-3] + b"xyz")
    looked = len(encoded)
    with running_engine(vlm, feature_folder=tmp_path) as engine:
        [again] = ask_all(engine, [question(WIDE, ASKED, max_tokens=4)])
    assert again.token_ids == first.token_ids
    assert len(encoded) > looked


def test_features_on_disk_stay_below_their_limit(vlm, tmp_path):
    images = [random_image(60, 60, n) for n in range(8)]
    with running_engine(vlm, feature_folder=tmp_path, feature_disk_nbytes=12_000) as engine:
        for image in images:
            ask_all(engine, [question(image, ASKED, max_tokens=1)])
    kept = [*tmp_path.glob("*/*.safetensors")]
    assert 0 < len(kept) < 8
    assert sum(path.stat().st_size for path in kept) <= 12_000
    with running_engine(vlm, feature_folder=tmp_path, feature_disk_nbytes=12_000) as engine:
        ask_all(engine, [question(images[-1], ASKED, max_tokens=1)])
        assert engine.metrics().image_features_computed == 0


def test_two_models_answer_at_the_same_time(vlm, other):
    wanted = [one.ask(ASKED, [WIDE], max_tokens=10).token_ids for one in (vlm, other)]
    with running_engine(vlm, other) as engine:
        found = ask_all(
            engine,
            [question(WIDE, ASKED, max_tokens=10, model=one.name) for one in (vlm, other)],
        )
        names = [model.name for model in engine.status().models if model.loaded]
    assert [reply.token_ids for reply in found] == wanted
    assert names == [vlm.name, other.name]


def test_one_model_makes_room_for_another_once_its_answers_have_ended(vlm, other):
    order = [vlm, other, vlm, other]
    wanted = [one.ask("Hi", max_tokens=6).token_ids for one in order]
    with running_engine(vlm, other, max_models=1) as engine:
        asked = [question("Hi", max_tokens=6, model=one.name) for one in order]
        found = ask_all(engine, asked)
        loaded = [model.loaded for model in engine.status().models]
    assert [reply.token_ids for reply in found] == wanted
    assert sum(loaded) == 1


def test_an_idle_model_is_put_away_and_comes_back(vlm):
    async def wait(engine):
        await ask(engine, question("Hi", max_tokens=2))
        assert engine.status().models[0].expires_at > time.time() - 1
        while engine.status().models[0].loaded:
            await asyncio.sleep(0.01)
        return await ask(engine, question("Hi", max_tokens=2))

    with running_engine(vlm, idle_timeout_s=0.1) as engine:
        asyncio.run(asyncio.wait_for(wait(engine), 20))
        assert engine.metrics().model_loads == 2


def test_models_are_loaded_and_put_away_on_demand(vlm):
    async def both(engine):
        loaded = await engine.load()
        tokens = await engine.count_tokens(question(WIDE, ASKED))
        await engine.unload(vlm.name)
        return loaded, tokens

    with running_engine(vlm) as engine:
        loaded, tokens = asyncio.run(both(engine))
        assert not engine.status().models[0].loaded
        with pytest.raises(UnknownModel, match="no model 'x'"):
            asyncio.run(engine.load("x"))
    assert loaded.nbytes == vlm.runner.weights_nbytes
    assert loaded.context_length == vlm.config.text.max_position_embeddings
    assert tokens == len(vlm.prepare_inputs(ASKED, [WIDE]).token_ids)


def test_a_model_that_cannot_be_loaded_refuses_its_requests_alone(vlm):
    def loader(source, *_):
        if source.model == "broken":
            raise ZeroDivisionError
        return vlm.runner

    engine = Engine(EngineSettings({"good": "good", "broken": "broken"}), loader)
    engine.start()
    bad, good = ask_all(
        engine, [question("Hi", model="broken"), question("Hi", model="good", max_tokens=1)]
    )
    engine.stop(0)
    assert "ZeroDivisionError" in str(bad)
    assert len(good.token_ids) == 1


def test_adapters_have_a_name_with_every_model():
    found = model_sources(EngineSettings({"a": "x", "b": "y"}, {"cats": "folder"}))
    assert found == {
        "a": ModelSource("x"),
        "b": ModelSource("y"),
        "a:cats": ModelSource("x", "folder"),
        "b:cats": ModelSource("y", "folder"),
    }


def settled_memory():
    """Return the active memory once the worker has freed what it held: the least of a while."""
    found = []
    for _ in range(10):
        time.sleep(0.02)
        found.append(mx.get_active_memory())
    return min(found)


def test_memory_is_flat_over_many_requests(vlm):
    settings = {"prefix_cache_nbytes": 300_000, "feature_cache_nbytes": 20_000}
    used = []
    with running_engine(vlm, **settings) as engine:
        for start in range(0, 240, 40):
            asked = [
                question(random_image(60, 60, 1000 + start + n), f"{n}?", max_tokens=2)
                for n in range(40)
            ]
            ask_all(engine, asked)
            used.append(settled_memory())
        metrics = engine.metrics()
    assert metrics.kv_nbytes == 0
    assert max(used[2:]) - used[1] < 100_000
    assert metrics.prefix_cache_nbytes <= 300_000
    del asked
    gc.collect()
    assert not [one for one in gc.get_objects() if isinstance(one, QueuedRequest)]
    assert math.isfinite(metrics.peak_memory_nbytes)
