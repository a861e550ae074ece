"""Cut off anywhere, a talk is whole: in the tower, while reading, while writing, while saving."""

import os
import signal
import subprocess
import sys
import time

import pytest
from fixtures.inputs import picture
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx import GenerationConfig, PromptError, load
from internvl3_mlx.models.cache import KVCache

CAT, DOG = picture(130, 70), picture(60, 60, 1)
SHORT = {"max_tokens": 6}


@pytest.fixture(scope="module")
def vlm():
    return load(str(tiny(Recipe()).folder))


@pytest.fixture
def talk(vlm):
    """A talk of one turn, about to be interrupted in its second."""
    talk = vlm.conversation(v2pe_delta="1/4")
    talk.ask("What is it?", [CAT], **SHORT)
    return talk


def ask_fresh(talk, question, images):
    """Ask with the history of a conversation, but without its prompt cache."""
    config = GenerationConfig(history=talk.history, v2pe_delta="1/4", **SHORT)
    return talk.runner.answer(talk.runner.build_inputs(question, images, config), config)


def expected(talk, question, images):
    return ask_fresh(talk, question, [CAT, *images]).token_ids


def interrupted_at(call, number):
    """Raise KeyboardInterrupt at the ``number``-th call."""
    count = iter(range(1, 10**6))

    def wrapped(*args, **kwargs):
        if next(count) == number:
            raise KeyboardInterrupt
        return call(*args, **kwargs)

    return wrapped


def test_an_interrupt_in_the_tower_leaves_the_talk_as_it_was(talk, monkeypatch):
    before, wanted = talk.history, expected(talk, "And this?", [DOG])
    with monkeypatch.context() as patch:
        see = type(talk.runner.model).encode_tiles
        patch.setattr(type(talk.runner.model), "encode_tiles", interrupted_at(see, 1))
        with pytest.raises(KeyboardInterrupt):
            talk.ask("And this?", [DOG], **SHORT)
    assert talk.history == before
    assert talk.ask("And this?", [DOG], **SHORT).token_ids == wanted


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5, 8, 11])
def test_an_interrupt_between_any_two_layers_leaves_the_cache_whole(talk, monkeypatch, call):
    wanted = expected(talk, "And this?", [DOG])
    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "update_and_fetch", interrupted_at(KVCache.update_and_fetch, call))
        with pytest.raises(KeyboardInterrupt):
            talk.ask("And this?", [DOG], prefill_step_size=9, **SHORT)
    if len(talk.exchanges) == 2:
        talk.undo()
    assert talk.ask("And this?", [DOG], **SHORT).token_ids == wanted


@pytest.mark.parametrize("kept", [1, 2, 5])
def test_closing_the_stream_keeps_what_was_said(talk, kept):
    wanted = expected(talk, "And this?", [DOG])
    pieces = talk.stream("And this?", [DOG], **SHORT)
    for _ in range(kept):
        next(pieces)
    pieces.close()
    last = talk.exchanges[-1]
    assert list(last.token_ids) == wanted[:kept]
    assert not last.complete
    after = talk.ask("Go on.", **SHORT)
    talk.undo()
    fresh = ask_fresh(talk, "Go on.", [CAT, DOG])
    assert after.token_ids == fresh.token_ids
    assert after.usage.cached_tokens > len(
        talk.runner.build_inputs("And this?", [DOG], GenerationConfig()).token_ids
    )


def test_a_retry_that_says_nothing_keeps_the_old_answer(talk, monkeypatch):
    old = talk.exchanges[-1]
    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "update_and_fetch", interrupted_at(KVCache.update_and_fetch, 1))
        with pytest.raises(KeyboardInterrupt):
            talk.retry(**SHORT)
    assert talk.exchanges[-1] is old


def test_two_answers_at_once_are_refused(talk):
    pieces = talk.stream("And this?", [DOG], **SHORT)
    next(pieces)
    with pytest.raises(PromptError, match="an answer is still being generated"):
        talk.ask("Me first", **SHORT)
    pieces.close()
    assert talk.ask("Now?", **SHORT).text is not None


def test_a_stream_that_never_began_changes_nothing(talk):
    talk.stream("And this?", [DOG], **SHORT).close()
    assert len(talk.exchanges) == 1


SAVE_FOREVER = """
import sys
from internvl3_mlx import load
talk = load(sys.argv[1]).conversation()
talk.ask("What is it?", [sys.argv[2]], max_tokens=2)
talk.save(sys.argv[3], cache=True)
print("saved", flush=True)
while True:
    talk.save(sys.argv[3], cache=True)
"""


def test_killed_while_saving_the_files_are_whole(vlm, tmp_path):
    CAT.save(tmp_path / "cat.png")
    path = tmp_path / "talk.zip"
    words = [vlm.loaded.folder, tmp_path / "cat.png", path]
    child = subprocess.Popen(
        [sys.executable, "-c", SAVE_FOREVER, *map(str, words)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "saved\n"
    time.sleep(0.2)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    talk = vlm.conversation()
    assert talk.load(path)
    assert talk.ask("And?", **SHORT).usage.cached_tokens > 30
