"""A model and its conversations work in any thread, and may change threads between two steps.

MLX's streams belong to threads, on a CPU as on a GPU: an array that was not evaluated in the thread
that made it cannot be read in another.
"""

import threading

import mlx.core as mx
import pytest
from fixtures.records import write_image

from internvl3_mlx import load

QUESTION = "What is this?"
CACHES = [
    {},
    {"kv_bits": 8},
    {"kv_bits": 8, "quantized_kv_start": 16},  # quantized by the first question
    {"kv_bits": 4, "quantized_kv_start": 5000},
    {"lookup": True},
    {"repetition_penalty": 1.1, "temperature": 0.7, "seed": 1},
    {"v2pe_delta": 0.25},
]


@pytest.fixture(scope="module")
def vlm():
    return load("demo")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(3):
        write_image(folder / f"{number}.png", 90 + number, 60, number)
    return [folder / f"{number}.png" for number in range(3)]


def elsewhere(function):
    """Call a function in a new thread; return its result or raise its error."""
    outcome = {}

    def run():
        try:
            outcome["result"] = function()
        except BaseException as error:  # noqa: BLE001  raised again in the test's thread
            outcome["error"] = error

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


def test_loaded_here_and_asked_elsewhere(vlm, images):
    here = vlm.ask(QUESTION, images[0], max_tokens=6).text
    assert elsewhere(lambda: vlm.ask(QUESTION, images[0], max_tokens=6).text) == here


def test_loaded_elsewhere_and_asked_here(vlm, images):
    other = elsewhere(lambda: load("demo"))
    expected = vlm.ask(QUESTION, images[0], max_tokens=6).text
    assert other.ask(QUESTION, images[0], max_tokens=6).text == expected


@pytest.mark.parametrize("max_tokens", [1, 6])
@pytest.mark.parametrize("options", CACHES, ids=str)
def test_a_conversation_changes_threads_between_questions(vlm, images, options, max_tokens):
    def talk(run):
        conversation = vlm.conversation(max_tokens=max_tokens, **options)
        return [
            run(lambda: conversation.ask(QUESTION, images[0])).text,
            conversation.ask("What color is it?").text,
            run(lambda: conversation.ask("And now?", images[1])).text,
        ]

    assert talk(elsewhere) == talk(lambda function: function())


def test_a_stream_is_made_elsewhere_and_read_here(vlm, images):
    stream = elsewhere(lambda: vlm.conversation(max_tokens=6).stream(QUESTION, images[0]))
    assert "".join(chunk.text for chunk in stream) == (
        vlm.ask(QUESTION, images[0], max_tokens=6).text
    )


def test_the_first_chunk_comes_elsewhere_and_the_rest_here(vlm, images):
    stream = vlm.stream(QUESTION, images[0], max_tokens=6)
    first = elsewhere(lambda: next(stream))
    text = first.text + "".join(chunk.text for chunk in stream)
    assert text == vlm.ask(QUESTION, images[0], max_tokens=6).text


def test_a_stream_is_closed_elsewhere(vlm, images):
    stream = vlm.stream(QUESTION, images[0], max_tokens=40)
    next(stream)
    elsewhere(stream.close)
    assert vlm.ask(QUESTION, images[0], max_tokens=3).token_ids


def test_a_conversation_goes_on_elsewhere_after_a_stop_elsewhere(vlm, images):
    conversation = vlm.conversation(max_tokens=20)
    stream = conversation.stream(QUESTION, images[0])
    next(stream)
    elsewhere(stream.close)
    assert elsewhere(lambda: conversation.ask("And?")).token_ids


def test_samples_are_drawn_elsewhere(vlm, images):
    mx.random.seed(3)
    unevaluated = mx.random.normal((2,))
    answers = elsewhere(lambda: vlm.ask_many(QUESTION, images[0], n=3, temperature=1, max_tokens=4))
    assert len(answers) == 3
    assert unevaluated.shape == (2,)


def test_a_batch_alternates_between_threads(vlm, images):
    answers = elsewhere(lambda: vlm.ask_each(QUESTION, images, batch_size=2, max_tokens=6))
    texts = [next(answers).text, elsewhere(lambda: next(answers)).text, next(answers).text]
    assert texts == [vlm.ask(QUESTION, image, max_tokens=6).text for image in images]


def test_two_threads_answer_at_once(vlm, images):
    expected = [vlm.ask(QUESTION, image, max_tokens=5).text for image in images[:2]]
    found: dict[int, list[str]] = {}

    def ask(number):
        found[number] = [vlm.ask(QUESTION, images[number], max_tokens=5).text for _ in range(3)]

    threads = [threading.Thread(target=ask, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[0], found[1]] == [[text] * 3 for text in expected]
