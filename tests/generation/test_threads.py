"""One loaded model serves several threads and tasks; a forked child is refused with a line."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx import UserError, load
from internvl3_mlx.generation import compiled_step

IMAGES = [random_image(70 + 13 * n, 50 + 7 * n, n) for n in range(3)]
SHORT = {"max_tokens": 4}


def ask(vlm, number):
    return vlm.ask(f"Question {number}?", [IMAGES[number % 3]], **SHORT).token_ids


def test_threads_give_the_answers_of_one(vlm):
    alone = [ask(vlm, number) for number in range(6)]
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(lambda number: ask(vlm, number), range(6))) == alone


def test_threads_may_trace_their_steps_at_once(monkeypatch):
    """Each thread its own length, so that every one of them traces while others compute."""
    monkeypatch.setenv(compiled_step.MODE_VARIABLE, "on")
    fresh = load(str(tiny(Recipe(seed=2)).folder))

    def answer(number):
        return fresh.ask("Hi" + " there" * 130 * (number % 3), max_tokens=6).token_ids

    found = {}
    with ThreadPoolExecutor(3) as threads:
        found["on"] = list(threads.map(answer, range(6)))
    monkeypatch.setenv(compiled_step.MODE_VARIABLE, "off")
    found["off"] = [answer(number) for number in range(6)]
    assert found["on"] == found["off"]
    assert len(compiled_step.CompiledSteps.of(fresh.model).traces) >= 3


def test_tasks_give_the_answers_of_one(vlm):
    async def together():
        return await asyncio.gather(*(asyncio.to_thread(ask, vlm, n) for n in range(4)))

    alone = [ask(vlm, number) for number in range(4)]
    assert asyncio.run(together()) == alone


def test_streams_may_take_turns(vlm):
    alone = [vlm.ask(f"Question {n}?", [IMAGES[n]], **SHORT).text for n in range(2)]
    streams = [vlm.stream(f"Question {n}?", [IMAGES[n]], **SHORT) for n in range(2)]
    texts = ["", ""]
    while streams[0] or streams[1]:
        for n in range(2):
            chunk = next(streams[n], None) if streams[n] else None
            if chunk is None:
                streams[n] = None
            else:
                texts[n] += chunk.text
    assert texts == alone


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_is_refused_with_a_line(vlm):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            vlm.ask("Hello?", **SHORT)
            os.write(writing, b"answered")
        except UserError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        message = pipe.read()
    os.waitpid(child, 0)
    assert message.startswith("the model was loaded before this process was forked")
    assert message.endswith('load it in the child, or start processes by "spawn"')
