"""A served Flash model decides each prompt alone, and counts what it read."""

from dataclasses import replace

import pytest
from fixtures.flash import THRESHOLDS, build_flash, flash_checkpoint
from fixtures.inputs import random_image
from fixtures.serving import ask_all, assistant, question, request_of, running_engine, user

from internvl3_mlx import load
from internvl3_mlx.serving.requests import ContextTooLong, InvalidRequest

WIDE, TALL = random_image(170, 60, seed=1), random_image(50, 110, seed=2)


@pytest.fixture(scope="module")
def vlm():
    return load(str(flash_checkpoint().folder))


def test_prompts_asked_together_are_read_as_alone(vlm, tmp_path):
    asked = [[WIDE, "What?"], [TALL, WIDE, "Why?"], ["No image"], [WIDE, "What else?"]]
    options = {"max_tokens": 6}
    off = {**options, "visual_compression": False}
    requests = [question(*parts, **options) for parts in asked]
    requests.append(question(*asked[0], **off))
    wanted = [
        vlm.ask(parts[-1], parts[:-1], **given)
        for parts, given in [*((parts, options) for parts in asked), (asked[0], off)]
    ]
    settings = {"feature_folder": tmp_path, "feature_disk_nbytes": 10**8}
    with running_engine(vlm, **settings) as engine:
        found = ask_all(engine, requests)
        again = ask_all(engine, requests[:2])
    for reply, answer in zip([*found, *again], [*wanted, *wanted[:2]], strict=True):
        assert reply.token_ids == answer.token_ids
        usage = reply.done[0].usage
        assert usage.prompt_tokens == answer.usage.prompt_tokens
        assert [one.compressed_tiles for one in usage.images] == [
            one.compressed_tiles for one in answer.images
        ]
    assert wanted[0].usage.prompt_tokens < wanted[-1].usage.prompt_tokens
    with running_engine(vlm, **settings) as restarted:  # probabilities come from the disk, too
        [reply] = ask_all(restarted, requests[1:2])
        assert restarted.metrics().image_features_computed == 0
    assert reply.token_ids == wanted[1].token_ids


def test_a_conversation_keeps_its_decisions_from_request_to_request(vlm):
    chat = vlm.conversation(max_tokens=6)
    first = chat.ask("What?", [WIDE])
    before = [replace(message, token_ids=()) for message in chat.history]
    second = vlm.ask("And this?", [WIDE, TALL], history=before, max_tokens=6)
    messages = [user(WIDE, "What?"), assistant(first.text), user(TALL, "And this?")]
    with running_engine(vlm) as engine:
        [one] = ask_all(engine, [request_of(messages[0], max_tokens=6)])
        [two] = ask_all(engine, [request_of(*messages, max_tokens=6)])
    assert (one.token_ids, two.token_ids) == (first.token_ids, second.token_ids)
    decided = [image.compressed_tiles for image in two.done[0].usage.images]
    assert decided == [image.compressed_tiles for image in second.images]
    assert two.done[0].usage.cached_tokens >= first.usage.prompt_tokens


def test_the_context_is_checked_after_the_decision(vlm, tmp_path):
    full = len(vlm.prepare_inputs("?", [WIDE, TALL], system="").token_ids)
    thresholds = dict.fromkeys(THRESHOLDS, 0.0)
    narrow = load(str(build_flash(tmp_path, max_positions=full - 4, **thresholds).folder))
    options = {"system": "", "ntk": False, "max_tokens": 50}
    with running_engine(narrow) as engine:
        fits, short, long = ask_all(
            engine,
            [
                question(WIDE, TALL, "?", **options),
                question(WIDE, TALL, "?", visual_compression=False, **options),
                question(WIDE, TALL, WIDE, TALL, WIDE, TALL, "?", **options),
            ],
        )
    usage = fits.done[0].usage
    assert usage.prompt_tokens + usage.completion_tokens <= full - 4
    assert isinstance(short, ContextTooLong)
    assert isinstance(long, ContextTooLong)


def test_thresholds_for_another_model_are_refused(tmp_path):
    from fixtures.checkpoints import build

    with running_engine(load(str(build(tmp_path).folder))) as engine:
        [error] = ask_all(engine, [question("Hi", flash_absolute_threshold=0.5)])
    assert isinstance(error, InvalidRequest)
    assert "has no visual resolution router" in str(error)
