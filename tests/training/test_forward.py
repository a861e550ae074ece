"""From a batch to hidden states: image features reach their tokens from every stage."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from fixtures.inputs import random_pixels, relative_error
from fixtures.loaded_models import bare_model, numbers
from fixtures.tolerances import TOLERANCE
from fixtures.training_samples import make_sample

from internvl3_mlx.errors import PromptError
from internvl3_mlx.models.internvl import tiles_per_chunk
from internvl3_mlx.models.layers import run_block
from internvl3_mlx.training.data.collate import collate
from internvl3_mlx.training.forward import ForwardOptions, target_states, vision_states
from internvl3_mlx.training.trainable import set_trainable


@pytest.fixture
def case():
    model, checkpoint = bare_model("6b")
    samples = [
        make_sample(checkpoint, (2, 1), seed=1),
        make_sample(checkpoint),
        make_sample(checkpoint, (3,)),
    ]
    batch = collate(samples)
    return model, batch, mx.array(np.concatenate([seen.tiles for seen in batch.images]))


def test_target_states_equal_the_models_own_states(case):
    model, batch, tiles = case
    found = numbers(target_states(model, batch, None))
    span = batch.spans[0]
    ids = mx.array(batch.input_ids[: span.stop])[None]
    language = model.language_model
    rotary = language.rotary(mx.array(batch.positions[: span.stop]), span.stop)
    alone = numbers(language.model(model.embed(ids, model.get_image_features(tiles[:3])), rotary))[
        0
    ]
    mine = batch.target_positions < span.stop
    assert relative_error(found[mine], alone[batch.target_positions[mine]]) < TOLERANCE


@pytest.mark.parametrize("trained", [(), ("mlp1",), ("vision_model",)])
def test_tiles_vision_states_and_features_give_the_same_states(case, trained):
    model, batch, tiles = case
    model.freeze()
    if trained:
        set_trainable(model, trained)
    model.eval()
    stages = [None, tiles, model.vision_model(tiles), model.get_image_features(tiles)]
    assert tiles.shape[0] > tiles_per_chunk()
    own, *others = (numbers(target_states(model, batch, stage)) for stage in stages)
    assert max(relative_error(other, own) for other in others) < TOLERANCE


def test_an_earlier_vision_layer_can_be_selected_in_training(case, monkeypatch):
    model, batch, tiles = case
    last = numbers(target_states(model, batch, None))
    monkeypatch.setattr(model, "config", with_fields(model.config, select_layer=-2))
    lower = numbers(target_states(model, batch, None))
    states = model.vision_model(tiles, -2)
    assert relative_error(lower, numbers(target_states(model, batch, states))) < TOLERANCE
    assert relative_error(lower, last) > 1e-3


def with_fields(config, **fields):
    return type(config)(**{**vars(config), **fields})


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_frozen_vision_tower_stores_only_its_states_for_the_gradient(dtype):
    model, checkpoint = bare_model("6b")
    model.set_dtype(dtype)
    set_trainable(model, ("mlp1",))
    states = model.vision_model(mx.array(random_pixels(checkpoint, 1), dtype))
    used = [gradient_peak_memory(model, random_pixels(checkpoint, tiles)) for tiles in (8, 64)]
    assert used[1] - used[0] < 2 * 56 * states.nbytes  # of 56 tiles more, and of their join


def gradient_peak_memory(model, pixels):
    """Say how many bytes exist at once while the projector learns from one tile of many."""
    tiles = mx.array(pixels)
    mx.eval(tiles, model.parameters())
    step = nn.value_and_grad(
        model,
        lambda: model.project(vision_states(model, tiles, ForwardOptions(), run_block)[:1]).sum(),
    )
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(step())
    return mx.get_peak_memory() - before


def test_a_wrong_number_of_image_features_is_reported_with_the_location(case):
    model, batch, tiles = case
    with pytest.raises(
        PromptError,
        match=r"rows.jsonl:2, rows.jsonl:1, rows.jsonl:1: 54 image tokens but 45 image features",
    ):
        target_states(model, batch, model.get_image_features(tiles[1:]))
