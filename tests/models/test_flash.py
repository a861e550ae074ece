"""The visual resolution router against torch: probabilities, both forms, decisions."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from fixtures.flash import UNUSED, FlashInternVL, flash_checkpoint
from fixtures.inputs import random_pixels, relative_error
from fixtures.loaded_models import numbers
from fixtures.tolerances import TOLERANCE

from internvl3_mlx.checkpoints.build_model import build_model
from internvl3_mlx.config import parse_config
from internvl3_mlx.errors import ConfigError
from internvl3_mlx.models.flash import compressed_tiles, quantile


@pytest.mark.parametrize("style", ["300m", "300m-fused"])
def test_router_and_both_forms_equal_torch(style):
    checkpoint = flash_checkpoint(style=style)
    model, theirs = build_model(checkpoint.folder).model, FlashInternVL(checkpoint)
    pixels = random_pixels(checkpoint, 3)
    features, probability = model.route_tiles(mx.array(pixels))
    wanted = theirs.probabilities(pixels).numpy()
    assert np.ptp(wanted) > 0.05
    assert relative_error(numbers(probability), wanted) < TOLERANCE
    full = checkpoint.recipe.tokens_per_tile
    assert features.shape[1] == full + full // 4
    both = torch.cat(
        [
            theirs.features(torch.tensor(pixels).permute(0, 3, 1, 2)),
            theirs.compressed_features(pixels),
        ],
        1,
    )
    assert relative_error(numbers(features), both.detach().numpy()) < TOLERANCE


def test_what_is_stored_and_unused_has_no_weights_here():
    checkpoint = flash_checkpoint()
    stored = mx.load(str(checkpoint.folder / "model.safetensors"))
    assert any(name.startswith("pooling_before_gating.attn3.") for name in stored)
    pooling = build_model(checkpoint.folder).model.pooling_before_gating
    assert not {*UNUSED} & {*pooling}


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.5, 0.73, 1.0])
def test_the_quantile_divides_values_where_torchs_does(fraction):
    draw = np.random.default_rng(3)
    for count in [*range(1, 14), 39, 101]:
        values = draw.random(count).astype(np.float32)
        ours, theirs = quantile(values, fraction), torch.quantile(torch.tensor(values), fraction)
        assert abs(ours - theirs.numpy()) <= np.spacing(np.float32(1))
        assert ((values > ours) == (values > theirs.numpy())).all()


def test_both_thresholds_count():
    p = np.array([0.9, 0.2, 0.6, 0.7, 0.55], dtype=np.float32)
    [above] = compressed_tiles([p], 0.5, 0.0)
    assert above.tolist() == [True, False, False, True, False]  # the median itself is not above
    [both] = compressed_tiles([p], 0.0, 0.6)
    assert both.tolist() == [True, False, True, True, False]
    [none] = compressed_tiles([p[:1]], 0.0, 0.0)  # a single tile is its own quantile
    assert none.tolist() == [False]


def test_later_messages_do_not_change_earlier_decisions():
    draw = np.random.default_rng(5)
    turns = [draw.random(n).astype(np.float32) for n in (3, 0, 5, 1)]
    masks = compressed_tiles(turns, 0.4, 0.1)
    for count in range(1, 5):
        for found, wanted in zip(compressed_tiles(turns[:count], 0.4, 0.1), masks, strict=False):
            assert found.tolist() == wanted.tolist()
    p = torch.tensor(np.concatenate(turns[:3]))  # the third call as it would be alone
    whole = (p > torch.quantile(p, 0.4)) & (p >= 0.1)
    assert masks[2].tolist() == whole[3:].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flash_relative_threshold": None}, "flash_mode but no flash_relative_threshold"),
        ({"flash_absolute_threshold": 1.5}, "flash_absolute_threshold is '1.5'; expected"),
    ],
)
def test_thresholds_are_checked(change, message):
    content = {
        "model_type": "internvl_chat",
        "flash_mode": True,
        "flash_relative_threshold": 0.5,
        "flash_absolute_threshold": 0.5,
        "force_image_size": 56,
        "vision_config": {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 8,
            "image_size": 56,
        },
        "llm_config": {
            "model_type": "qwen2",
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 8,
            "vocab_size": 9,
        },
    }
    assert parse_config(content).num_compressed_token == 1
    with pytest.raises(ConfigError, match=message):
        parse_config(content | change)
