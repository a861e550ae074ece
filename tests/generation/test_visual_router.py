"""Flash through the public face: decisions, tokens and positions are those of torch."""

import numpy as np
import pytest
import torch
from fixtures.flash import FlashInternVL, build_flash, flash_checkpoint
from fixtures.inputs import random_image, relative_error
from fixtures.loaded_models import numbers
from fixtures.tolerances import TOLERANCE

from internvl3_mlx import UserError, load
from internvl3_mlx.cli.console import format_stats
from internvl3_mlx.errors import PromptError
from internvl3_mlx.generation.exchange import Exchange
from internvl3_mlx.generation.prefill import open_prefill
from internvl3_mlx.generation.prompt_cache import PromptCache
from internvl3_mlx.images.tiling import normalize

STEPS = 12
WIDE, TALL = random_image(170, 60, seed=1), random_image(50, 110, seed=2)


@pytest.fixture(scope="module")
def checkpoint():
    return flash_checkpoint()


@pytest.fixture(scope="module")
def vlm(checkpoint):
    return load(str(checkpoint.folder))


@pytest.fixture(scope="module")
def theirs(checkpoint):
    return FlashInternVL(checkpoint)


def pixels_of(inputs) -> np.ndarray:
    return normalize(np.concatenate([image.tiles for image in inputs.processed_images]))


def read(vlm, inputs, **options):
    config = vlm.conversation(**options).generation_config
    return open_prefill(vlm.model, inputs, config, PromptCache())


@pytest.mark.parametrize(
    ("style", "images"),
    [("300m", [WIDE]), ("300m", [TALL, WIDE]), ("qwen3", [TALL, WIDE])],
    ids=["one", "two", "qwen3"],
)
def test_decisions_tokens_and_logits_equal_torch(style, images):
    checkpoint = flash_checkpoint(style=style)
    vlm, theirs = load(str(checkpoint.folder)), FlashInternVL(checkpoint)
    inputs = vlm.prepare_inputs("What?", images)
    pixels = pixels_of(inputs)
    decided = theirs.decide(pixels).tolist()
    assert 0 < sum(decided) < len(decided)
    prefill = read(vlm, inputs)
    ours = [compressed for one in prefill.inputs.processed_images for compressed in one.compressed]
    assert ours == decided
    shortened, _ = theirs.shorten(inputs.token_ids, pixels, decided)
    assert prefill.inputs.token_ids == shortened
    assert prefill.inputs.positions.tolist() == [*range(len(shortened))]
    logits = numbers(prefill.run(prefill.encode_images()))
    wanted = theirs.flash_logits(inputs.token_ids, pixels)[:, -1]
    assert relative_error(logits, wanted) < TOLERANCE
    answer = vlm.ask("What?", images, max_tokens=STEPS)
    greedy = theirs.flash_greedy(inputs.token_ids, pixels, STEPS)
    assert answer.token_ids == greedy[: len(answer.token_ids)]
    assert answer.usage.prompt_tokens == len(shortened)
    assert answer.usage.image_tokens == sum(image.tokens for image in answer.images)
    assert sum(image.compressed_tiles for image in answer.images) == sum(decided)
    assert f"{sum(decided)} of {len(decided)} tiles compressed" in format_stats(answer)
    assert answer.to_dict()["images"][0]["compressed_tiles"] == answer.images[0].compressed_tiles


def test_compression_can_be_turned_off(vlm, theirs):
    inputs = vlm.prepare_inputs("What?", [WIDE])
    pixels = pixels_of(inputs)
    answer = vlm.ask("What?", [WIDE], max_tokens=STEPS, visual_compression=False)
    greedy = theirs.flash_greedy(inputs.token_ids, pixels, STEPS, [False] * len(pixels))
    assert answer.token_ids == greedy[: len(answer.token_ids)]
    assert answer.usage.prompt_tokens == len(inputs.token_ids)
    assert "compressed_tiles" not in answer.to_dict()["images"][0]


@pytest.mark.parametrize(
    ("relative", "absolute"), [(0.0, 0.0), (0.8, 0.0), (0.0, 0.45), (0.0, 1.0)]
)
def test_options_replace_the_thresholds(vlm, theirs, relative, absolute):
    inputs = vlm.prepare_inputs("What?", [TALL, WIDE])
    thresholds = {"flash_relative_threshold": relative, "flash_absolute_threshold": absolute}
    found = read(vlm, inputs, **thresholds).inputs.processed_images
    p = theirs.probabilities(pixels_of(inputs))
    wanted = (p > torch.quantile(p, relative)) & (p >= absolute)
    assert [flag for image in found for flag in image.compressed] == wanted.tolist()


def test_earlier_turns_keep_their_decisions_and_are_read_once(vlm, theirs):
    chat = vlm.conversation(max_tokens=6)
    first = chat.ask("What?", [WIDE])
    second = chat.ask("And this?", [TALL])
    third = chat.ask("Why?")
    exchanged = chat.exchanges
    unasked = chat.build_inputs(exchanged, Exchange(""), chat.generation_config)
    saved = sum(one.tokens for one in unasked.images) - sum(one.tokens for one in third.images)
    assert chat.budget.positions == unasked.next_position - saved < unasked.next_position
    images = [one for past in exchanged for one in past.images]
    tiles = [normalize(image.tiles) for image in images]
    alone = theirs.decide(tiles[0]).tolist()
    together = theirs.decide(np.concatenate(tiles)).tolist()
    masks = [*alone, *together[len(alone) :]]
    assert sum(alone) == first.images[0].compressed_tiles
    assert sum(masks[len(alone) :]) == second.images[1].compressed_tiles
    for answer in (second, third):
        assert answer.images[0] == first.images[0]
    assert second.usage.cached_tokens >= first.usage.prompt_tokens
    assert third.usage.cached_tokens >= second.usage.prompt_tokens
    fresh = vlm.ask("Why?", [WIDE, TALL], history=chat.history[:4], max_tokens=6)
    assert fresh.token_ids == third.token_ids
    full = vlm.prepare_inputs("Why?", [WIDE, TALL], history=chat.history[:4])
    steps = len(third.token_ids)
    greedy = theirs.flash_greedy(full.token_ids, np.concatenate(tiles), steps, masks)
    assert third.token_ids == greedy


def test_prompts_of_a_batch_are_decided_alone(vlm):
    questions = [("What?", [WIDE]), ("Why is this?", [TALL, WIDE]), ("No image", [])]
    alone = [vlm.ask(text, images, max_tokens=6) for text, images in questions]
    inputs = [vlm.prepare_inputs(text, images) for text, images in questions]
    from internvl3_mlx.generation.batch_generate import batch_generate

    config = vlm.conversation(max_tokens=6).generation_config
    together = [*batch_generate(vlm.runner, inputs, config, 3)]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert [one.images for one in together] == [one.images for one in alone]
    assert [one.usage.prompt_tokens for one in together] == [
        one.usage.prompt_tokens for one in alone
    ]


def test_samples_and_drafts_read_the_shortened_prompt(vlm, tmp_path):
    build_flash(tmp_path / "small", seed=4)
    plain = vlm.ask("What?", [WIDE], max_tokens=8)
    drafted = vlm.ask("What?", [WIDE], max_tokens=8, draft_model=str(tmp_path / "small"))
    assert (drafted.token_ids, drafted.images) == (plain.token_ids, plain.images)
    sampled = vlm.ask_many("What?", [WIDE], n=2, seed=3, temperature=1.0, max_tokens=5)
    single = vlm.ask("What?", [WIDE], seed=3, temperature=1.0, max_tokens=5)
    assert (sampled[0].token_ids, sampled[0].images) == (single.token_ids, single.images)


def test_a_prompt_that_fits_only_when_compressed_is_answered(vlm, tmp_path):
    images, most = [WIDE, TALL], {"flash_relative_threshold": 0.0, "flash_absolute_threshold": 0.0}
    full = len(vlm.prepare_inputs("?", images, system="").token_ids)
    window = full - 4
    narrow = load(str(build_flash(tmp_path, max_positions=window, **most).folder))
    answer = narrow.ask("?", images, system="", ntk=False, max_tokens=2)
    assert answer.usage.prompt_tokens < window
    message = f"but the model's context has {window}"
    with pytest.raises(PromptError, match=message):
        narrow.ask("?", images, system="", ntk=False, visual_compression=False)
    with pytest.raises(PromptError, match=message):
        narrow.ask("?", images * 3, system="", ntk=False)


def test_thresholds_for_a_model_without_a_router_are_refused(tmp_path):
    from fixtures.checkpoints import build

    vlm = load(str(build(tmp_path).folder))
    with pytest.raises(UserError, match="has no visual resolution router"):
        vlm.conversation().configure(flash_absolute_threshold=0.5)
    with pytest.raises(UserError, match="has no visual resolution router"):
        vlm.ask("What?", flash_relative_threshold=0.5)


@pytest.mark.parametrize("compress", [True, False])
def test_images_encoded_early_are_decided_about_as_without(vlm, monkeypatch, compress):
    options = {"max_tokens": 4, "visual_compression": compress}
    expected = vlm.conversation(**options).ask("What?", [WIDE, TALL])
    routed, route = [], type(vlm.model).route_images
    monkeypatch.setattr(
        type(vlm.model),
        "route_images",
        lambda self, tiles: routed.append(len(tiles)) or route(self, tiles),
    )
    chat = vlm.conversation(**options)
    wide, tall = map(chat.process_image, (WIDE, TALL))
    chat.encode_early([wide])
    assert routed == [len(wide.tiles)]
    answer = chat.ask("What?", [wide, tall])
    assert routed == [len(wide.tiles), len(tall.tiles)]
    assert answer.token_ids == expected.token_ids
