"""Interrupted anywhere (tower, prefill, decoding, saving), a conversation stays whole."""

import os
import signal
import subprocess
import sys
import time

import pytest
from fixtures.inputs import random_image

from internvl3_mlx import GenerationConfig, PromptError
from internvl3_mlx.models.cache import KVCache

CAT, DOG = random_image(130, 70), random_image(60, 60, 1)
SHORT = {"max_tokens": 6}


@pytest.fixture
def conversation(vlm):
    """A conversation of one turn, about to be interrupted in its second."""
    conversation = vlm.conversation(v2pe_delta="1/4")
    conversation.ask("What is it?", [CAT], **SHORT)
    return conversation


def ask_fresh(conversation, question, images):
    """Ask with the history of a conversation, but without its prompt cache."""
    config = GenerationConfig(history=conversation.history, v2pe_delta="1/4", **SHORT)
    return conversation.runner.answer(
        conversation.runner.build_inputs(question, images, config), config
    )


def expected(conversation, question, images):
    return ask_fresh(conversation, question, [CAT, *images]).token_ids


def interrupted_at(call, number):
    """Raise KeyboardInterrupt at the ``number``-th call."""
    count = iter(range(1, 10**6))

    def wrapped(*args, **kwargs):
        if next(count) == number:
            raise KeyboardInterrupt
        return call(*args, **kwargs)

    return wrapped


def test_an_interrupt_in_the_tower_leaves_the_conversation_as_it_was(conversation, monkeypatch):
    before, wanted = conversation.history, expected(conversation, "And this?", [DOG])
    with monkeypatch.context() as patch:
        see = type(conversation.runner.model).encode_tiles
        patch.setattr(type(conversation.runner.model), "encode_tiles", interrupted_at(see, 1))
        with pytest.raises(KeyboardInterrupt):
            conversation.ask("And this?", [DOG], **SHORT)
    assert conversation.history == before
    assert conversation.ask("And this?", [DOG], **SHORT).token_ids == wanted


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5, 8, 11])
def test_an_interrupt_between_any_two_layers_leaves_the_cache_whole(
    conversation, monkeypatch, call
):
    wanted = expected(conversation, "And this?", [DOG])
    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "update_and_fetch", interrupted_at(KVCache.update_and_fetch, call))
        with pytest.raises(KeyboardInterrupt):
            conversation.ask("And this?", [DOG], prefill_step_size=9, **SHORT)
    if len(conversation.exchanges) == 2:
        conversation.undo()
    assert conversation.ask("And this?", [DOG], **SHORT).token_ids == wanted


@pytest.mark.parametrize("kept", [1, 2, 5])
def test_closing_the_stream_keeps_what_was_said(conversation, kept):
    wanted = expected(conversation, "And this?", [DOG])
    pieces = conversation.stream("And this?", [DOG], **SHORT)
    for _ in range(kept):
        next(pieces)
    pieces.close()
    last = conversation.exchanges[-1]
    assert list(last.token_ids) == wanted[:kept]
    assert not last.complete
    after = conversation.ask("Go on.", **SHORT)
    conversation.undo()
    fresh = ask_fresh(conversation, "Go on.", [CAT, DOG])
    assert after.token_ids == fresh.token_ids
    assert after.usage.cached_tokens > len(
        conversation.runner.build_inputs("And this?", [DOG], GenerationConfig()).token_ids
    )


def test_a_retry_that_says_nothing_keeps_the_old_answer(conversation, monkeypatch):
    old = conversation.exchanges[-1]
    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "update_and_fetch", interrupted_at(KVCache.update_and_fetch, 1))
        with pytest.raises(KeyboardInterrupt):
            conversation.retry(**SHORT)
    assert conversation.exchanges[-1] is old


def test_two_answers_at_once_are_refused(conversation):
    pieces = conversation.stream("And this?", [DOG], **SHORT)
    next(pieces)
    with pytest.raises(PromptError, match="an answer is still being generated"):
        conversation.ask("Me first", **SHORT)
    pieces.close()
    assert conversation.ask("Now?", **SHORT).text is not None


def test_a_stream_that_never_began_changes_nothing(conversation):
    conversation.stream("And this?", [DOG], **SHORT).close()
    assert len(conversation.exchanges) == 1


SAVE_FOREVER = """
import sys
from internvl3_mlx import load
conversation = load(sys.argv[1]).conversation()
conversation.ask("What is it?", [sys.argv[2]], max_tokens=2)
conversation.save(sys.argv[3], cache=True)
print("saved", flush=True)
while True:
    conversation.save(sys.argv[3], cache=True)
"""


def test_killed_while_saving_the_files_are_whole(vlm, tmp_path):
    CAT.save(tmp_path / "cat.png")
    path = tmp_path / "conversation.zip"
    words = [vlm.loaded.folder, tmp_path / "cat.png", path]
    child = subprocess.Popen(
        [sys.executable, "-c", SAVE_FOREVER, *map(str, words)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "saved\n"
    time.sleep(0.2)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    conversation = vlm.conversation()
    assert conversation.load(path)
    assert conversation.ask("And?", **SHORT).usage.cached_tokens > 30
