"""A fault at any stage of answering ends that answer and nothing else."""

import threading

import pytest
from fixtures.faults import ALONE, STAGES, PanicException, fault_at
from fixtures.inputs import random_image

from internvl3_mlx import generate, stream_generate
from internvl3_mlx.errors import PromptError

QUESTION, IMAGE = "What is it?", random_image(130, 70)
EVERY_STAGE = {**STAGES, **ALONE}


@pytest.fixture(scope="module")
def expected(vlm):
    return vlm.ask(QUESTION, [IMAGE], max_tokens=5).text


@pytest.mark.parametrize("stage", EVERY_STAGE)
@pytest.mark.parametrize("fault", [ZeroDivisionError, RuntimeError, PanicException])
def test_after_a_fault_the_same_conversation_answers(vlm, expected, stage, fault):
    conversation = vlm.conversation(max_tokens=5)
    with fault_at(EVERY_STAGE[stage], fault), pytest.raises(fault):
        conversation.ask(QUESTION, [IMAGE])
    conversation.exchanges = []  # what a fault in mid-answer left is part of the conversation
    assert conversation.ask(QUESTION, [IMAGE]).text == expected


@pytest.mark.parametrize("stage", EVERY_STAGE)
def test_after_a_fault_the_model_answers(vlm, expected, stage):
    with fault_at(EVERY_STAGE[stage]), pytest.raises(ZeroDivisionError):
        vlm.ask(QUESTION, [IMAGE], max_tokens=5)
    assert vlm.ask(QUESTION, [IMAGE], max_tokens=5).text == expected


ASKING = {
    "generate": lambda vlm: generate(vlm, QUESTION, IMAGE, max_tokens=5).text,
    "stream_generate": lambda vlm: (
        [*stream_generate(vlm, QUESTION, IMAGE, max_tokens=5)][-1].answer.text
    ),
    "ask_each": lambda vlm: next(iter(vlm.ask_each(QUESTION, [IMAGE], max_tokens=5))).text,
    "ask_many": lambda vlm: vlm.ask_many(QUESTION, [IMAGE], n=2, max_tokens=5)[0].text,
}


@pytest.mark.parametrize("fault", [ZeroDivisionError, RuntimeError, PanicException])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("asking", ASKING)
def test_after_a_fault_every_python_function_answers(vlm, expected, asking, stage, fault):
    with fault_at(STAGES[stage], fault), pytest.raises(fault):
        ASKING[asking](vlm)
    assert ASKING[asking](vlm) == expected


def test_a_fault_that_hides_the_ids_loses_no_answer(vlm):
    conversation = vlm.conversation(max_tokens=5)
    place = ("internvl3_mlx.generation.conversation", "Conversation.ids_match_text")
    with fault_at(place), pytest.raises(ZeroDivisionError):
        conversation.ask("What is it?")
    assert conversation.exchanges[0].answer
    conversation.ask("And now?")


def test_of_two_answers_at_once_one_is_refused_and_none_is_lost(vlm):
    conversation = vlm.conversation(max_tokens=3)
    barrier, refused = threading.Barrier(4), []

    def ask(number):
        barrier.wait()
        for turn in range(3):
            try:
                conversation.ask(f"question {number} {turn}")
            except PromptError:
                refused.append((number, turn))

    threads = [threading.Thread(target=ask, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversation.exchanges) + len(refused) == 12
    assert conversation.exchanges


def test_a_stream_that_no_longer_fits_the_conversation_is_refused(vlm):
    conversation = vlm.conversation(max_tokens=3)
    first, second = conversation.stream("one"), conversation.stream("two")
    list(first)
    with pytest.raises(PromptError, match="the conversation has changed since this question"):
        list(second)
    assert [exchange.question for exchange in conversation.exchanges] == ["one"]
