"""Images and frames are encoded while further ones are opened, and answers stay what they were."""

import contextlib
import threading
import time

import pytest
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe
from fixtures.videos import make_video

from internvl3_mlx import ImageError, PromptError, load
from internvl3_mlx.generation import open_media as opening
from internvl3_mlx.generation import processor as processing
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.processor import ProcessedImage
from internvl3_mlx.generation.prompt_cache import ImageFeatureCache
from internvl3_mlx.images import video as reader

PATIENCE_S = 20  # only where a test fails
CAT, DOG, SIGN = random_image(130, 70), random_image(60, 60, 1), random_image(70, 150, 2)
SHORT = {"max_tokens": 3}
ROADS = {
    "ask": lambda vlm, *given, **options: vlm.ask(*given, **options),
    "stream": lambda vlm, *given, **options: [*vlm.stream(*given, **options)][-1].answer,
    "ask_many": lambda vlm, *given, **options: vlm.ask_many(*given, n=2, **options)[0],
    "best_of": lambda vlm, *given, **options: vlm.best_of(*given, n=2, **options).candidates[0],
    "chat": lambda vlm, *given, **options: vlm.conversation().ask(*given, **options),
}


class Events:
    """What happened in which order: an image or frame is opened, some tiles are encoded.

    The ``late`` image to be opened waits until some tiles are encoded. waited: whether they were.
    """

    def __init__(self, late=None):
        self.log, self.waited, self.late, self.opened = [], [], late, 0
        self.encoded, self.main = threading.Event(), threading.get_ident()

    def open(self):
        self.opened += 1
        assert threading.get_ident() != self.main or self.late is None
        if self.opened == self.late:
            self.waited.append(self.encoded.wait(PATIENCE_S))
        self.log.append("open")

    def encode(self, tiles):
        assert threading.get_ident() == self.main
        self.log.append(tiles)
        self.encoded.set()


@pytest.fixture
def record(vlm, monkeypatch):
    """Record events from now on, by stand-ins around what opens and what encodes."""

    def begin(late=None):
        events = Events(late)
        open_image, upright = processing.open_image, reader._upright
        encode = type(vlm.model).get_image_features

        def opening_image(source, **options):
            events.open()
            return open_image(source, **options)

        def encoding(model, tiles):
            events.encode(len(tiles))
            return encode(model, tiles)

        monkeypatch.setattr(processing, "open_image", opening_image)
        monkeypatch.setattr(reader, "_upright", lambda frame: (events.open(), upright(frame))[1])
        monkeypatch.setattr(type(vlm.model), "get_image_features", encoding)
        return events

    return begin


def plain(vlm, question, images, **options):
    """Answer with everything opened before anything is encoded."""
    config = GenerationConfig(**options)
    return vlm.runner.answer(vlm.runner.build_inputs(question, images, config), config)


@pytest.mark.parametrize("road", ROADS.values(), ids=ROADS)
def test_an_image_is_encoded_while_the_next_is_opened(vlm, record, road):
    expected = plain(vlm, "Compare.", [CAT, DOG, SIGN], **SHORT)
    events = record(late=2)
    answer = road(vlm, "Compare.", [CAT, DOG, SIGN], **SHORT)
    assert events.waited == [True]
    tiles = [entry for entry in events.log if entry != "open"]
    assert tiles == [3, 1, 3]  # each image alone, and once
    assert getattr(answer, "answer", answer).token_ids == expected.token_ids


@pytest.mark.parametrize("road", ["ask", "chat"])
@pytest.mark.parametrize("num_frames", [6, 5])
def test_frames_are_encoded_while_further_ones_are_decoded(vlm, record, road, num_frames):
    options = {"video": (make_video(),), "num_frames": num_frames, **SHORT}
    expected = plain(vlm, "What happens?", (), **options)
    events = record(late=5)
    answer = ROADS[road](vlm, "What happens?", (), **options)
    assert events.waited == [True]
    assert [tiles for tiles in events.log if tiles != "open"] == [2, 2, num_frames - 4]
    assert answer.token_ids == expected.token_ids
    assert answer.images == expected.images


def test_an_image_is_encoded_while_the_first_frames_are_decoded(vlm, record):
    events = record(late=2)
    vlm.ask("What?", [CAT], video=make_video(), num_frames=2, **SHORT)
    assert events.waited == [True]
    assert events.log == ["open", 3, "open", "open", 2]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_next_image_is_opened_while_an_answer_about_one_begins(vlm, record, batch_size):
    expected = [plain(vlm, "What?", [image], **SHORT) for image in (CAT, DOG, SIGN)]
    events = record(late=2)
    answers = [*vlm.ask_each("What?", [CAT, DOG, SIGN], batch_size=batch_size, **SHORT)]
    assert events.waited == [True]
    assert [one.token_ids for one in answers] == [one.token_ids for one in expected]


def test_one_image_is_encoded_when_the_answer_begins_and_needs_no_thread(vlm, record):
    events = record()
    stream = vlm.stream("What?", DOG, **SHORT)
    assert events.log == ["open"]
    list(stream)
    assert events.log == ["open", 1]


def test_what_was_opened_before_waits_for_the_answer(vlm, record):
    conversation = vlm.conversation()
    ready = [*map(conversation.process_image, (CAT, DOG))]
    events = record()
    stream = conversation.stream("Compare.", ready, **SHORT)
    assert events.log == []
    list(stream)
    assert events.log == [4]


def test_few_images_are_ahead_of_the_one_that_is_encoded(vlm, record, monkeypatch):
    events, seen = record(), []
    encode = vlm.runner.encode_early

    def encoding(*given, **options):
        time.sleep(0.05)  # gives the thread the time to be further ahead than it may
        seen.append(events.opened)
        encode(*given, **options)

    monkeypatch.setattr(type(vlm.runner), "encode_early", lambda _, *a, **o: encoding(*a, **o))
    vlm.ask("Which?", [DOG] * 9, **SHORT)
    assert seen[0] <= 4  # one is encoded, two wait, one is being opened
    assert len(seen) == 8


@pytest.mark.parametrize("road", ["ask", "chat"])
def test_an_unreadable_image_is_an_error_and_leaves_no_thread(vlm, road):
    before = threading.active_count()
    with pytest.raises(ImageError, match="image bytes"):
        ROADS[road](vlm, "Compare.", [CAT, b"not an image", DOG], **SHORT)
    assert_threads_end(before)


def test_an_interruption_while_encoding_stops_the_thread_and_closes_the_video(vlm, monkeypatch):
    before, closed = threading.active_count(), threading.Event()
    frames = reader.iter_frames

    def opened(*given, **options):
        try:
            yield from frames(*given, **options)
        finally:
            closed.set()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(reader, "iter_frames", opened)
    conversation = vlm.conversation()
    with monkeypatch.context() as patch:
        patch.setattr(type(vlm.model), "get_image_features", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            conversation.ask("What?", video=make_video(), num_frames=40, **SHORT)
    assert closed.wait(PATIENCE_S)
    assert_threads_end(before)
    del caught
    assert conversation.exchanges == []
    assert conversation.ask("What?", [DOG], **SHORT).token_ids


def assert_threads_end(before):
    deadline = time.monotonic() + PATIENCE_S
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_nothing_is_encoded_beyond_the_context_window(record):
    vlm = load(str(tiny(Recipe(max_positions=28)).folder))
    most = vlm.config.text.max_position_embeddings // vlm.config.num_image_token
    options = {"video": make_video(), "num_frames": 20, "ntk": False, **SHORT}
    for delta, is_certain in ((1, True), (1 / 2, False), ("auto", False)):
        events = record()
        with contextlib.suppress(PromptError):
            vlm.ask("What?", v2pe_delta=delta, **options)
        encoded = sum(tiles for tiles in events.log if tiles != "open")
        assert encoded
        assert (encoded <= most + 1) == is_certain


def test_a_conversation_opens_nothing_while_it_answers(vlm, record):
    conversation = vlm.conversation()
    stream = conversation.stream("Hello", **SHORT)
    next(stream)
    events = record()
    with pytest.raises(PromptError, match="still being generated"):
        conversation.ask("Compare.", [CAT, DOG], **SHORT)
    assert events.log == []
    stream.close()


def test_images_of_a_question_are_tiled_by_its_own_options(vlm):
    answer = vlm.conversation().ask("What?", [CAT], max_tiles=1, **SHORT)
    assert [info.tiles for info in answer.images] == [1]


@pytest.mark.parametrize("road", ["ask", "chat"])
def test_encoding_meanwhile_counts_as_encoding(vlm, monkeypatch, road):
    clock = [0.0]

    def open_steps(*_):
        for image in images:
            clock[0] += 3 * (not opened.is_set())
            opened.set()
            yield opening.OpeningStep((image,), image)

    def encode(*_, **__):
        clock[0] += 5

    opened = threading.Event()
    images = [vlm.conversation().process_image(image) for image in (CAT, DOG)]
    peaks = iter((7 * 10**12, *[0] * 9))  # the encoding has the highest
    monkeypatch.setattr(opening.mx, "get_peak_memory", lambda: next(peaks))
    monkeypatch.setattr(opening.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(opening, "open_steps", open_steps)
    monkeypatch.setattr(type(vlm.runner), "encode_early", encode)
    answer = ROADS[road](vlm, "Compare.", [CAT, DOG], **SHORT)
    assert answer.peak_memory_gb == answer.held_memory_gb == 7000
    timing = answer.timing
    assert (timing.preprocess_s, timing.vision_s, timing.first_token_s) == (3, 5, 8)


def test_without_a_place_for_features_nothing_is_encoded(vlm, record):
    events = record()
    inputs = vlm.runner.build_inputs("Compare.", [CAT, DOG], GenerationConfig())
    assert events.log == ["open", "open"]
    again = vlm.runner.build_inputs("Compare.", [CAT, DOG], GenerationConfig(), ImageFeatureCache())
    assert again.token_ids == inputs.token_ids
    assert all(isinstance(image, ProcessedImage) for image in again.processed_images)
