"""Every published layout becomes the same model: to the bit where nothing is packed."""

import mlx.core as mx
import numpy as np
import pytest
from fixtures.inputs import random_pixels, relative_error, token_row
from fixtures.loaded_models import numbers, tiny
from fixtures.tiny import Bits, Recipe
from fixtures.tolerances import TOLERANCE

from internvl3_mlx import load

TILES = (2, 1)
LAYOUTS = [
    Recipe(layout="original", shards=3),
    Recipe(layout="original", form="bin"),
    Recipe(layout="original", form="bin", shards=2),
    Recipe(layout="hf_a"),
    Recipe(layout="hf_a", shards=2),
    Recipe(layout="hf_b"),
    Recipe(layout="hf_saved"),
    Recipe(layout="hf_saved", shards=2),
    Recipe(layout="mlx"),
    Recipe(layout="mlx", shards=2),
    Recipe(style="6b", layout="original", wrong_qk_norm_names=True),
    Recipe(style="6b", layout="hf_a"),
    Recipe(style="6b", layout="hf_a", wrong_qk_norm_names=True),
    Recipe(style="6b", layout="hf_b", wrong_qk_norm_names=True),
    Recipe(style="6b", layout="hf_saved"),
    Recipe(style="6b", layout="mlx"),
    Recipe(style="9b", layout="hf_a"),
    Recipe(style="9b", layout="hf_b"),
    Recipe(style="9b", layout="hf_saved"),
    Recipe(style="9b", layout="mlx"),
]
PACKED = [
    Recipe(layout="mlx", bits=Bits()),
    Recipe(layout="mlx", bits=Bits(bits=8, group_size=32)),
    Recipe(layout="mlx", bits=Bits(bits=3, group_size=32), shards=2),
    Recipe(layout="mlx", bits=Bits(bits=6, group_size=32, tower=True)),
    Recipe(style="6b", layout="mlx", bits=Bits(tower=True)),
    Recipe(style="9b", layout="mlx", bits=Bits(group_size=32)),
    Recipe(layout="mlx", bits=Bits(group_size=32, mode="mxfp4")),
    Recipe(layout="mlx", bits=Bits(bits=8, group_size=32, mode="mxfp8")),
    Recipe(layout="mlx", bits=Bits(group_size=16, mode="nvfp4")),
]
MIXED = {  # as mlx-vlm writes its mixed recipes: every exception by module path
    "language_model.model.embed_tokens": {"group_size": 64, "bits": 6},
    "language_model.model.layers.2.self_attn.v_proj": {"group_size": 64, "bits": 6},
    "language_model.model.layers.2.mlp.down_proj": {"group_size": 32, "bits": 8},
    "language_model.model.layers.0.mlp.up_proj": False,
    "language_model.lm_head": {"group_size": 64, "bits": 6},
    "mlp1.3": {"group_size": 32, "bits": 8},
}


def name_of(recipe):
    plain = Recipe()
    changed = [
        f"{key}={value.bits}-{value.mode}" if isinstance(value, Bits) else str(value)
        for key, value in vars(recipe).items()
        if value != getattr(plain, key)
    ]
    return "-".join(changed) or "plain"


def logits(recipe, **options):
    """Load a recipe's folder and score one row with two images: (L, V)."""
    checkpoint = tiny(recipe)
    vlm = load(str(checkpoint.folder), **options)
    ids, pixels = token_row(checkpoint, TILES), random_pixels(checkpoint, sum(TILES))
    return numbers(vlm.model(mx.array([ids]), mx.array(pixels)))[0]


def transformers_logits(recipe):
    checkpoint = tiny(recipe)
    ids, pixels = token_row(checkpoint, TILES), random_pixels(checkpoint, sum(TILES))
    return checkpoint.reference.logits(ids, pixels)[0]


@pytest.mark.parametrize("style", ["300m", "6b", "9b"])
def test_the_original_layout_gives_transformers_logits(style):
    recipe = Recipe(style=style)
    assert relative_error(logits(recipe), transformers_logits(recipe)) < TOLERANCE


@pytest.mark.parametrize("recipe", LAYOUTS, ids=name_of)
def test_every_layout_gives_the_logits_of_the_original_to_the_bit(recipe):
    np.testing.assert_array_equal(logits(recipe), logits(Recipe(style=recipe.style)))


def test_a_merged_checkpoint_may_keep_the_names_peft_gave_it():
    ours, plain = logits(Recipe(lora="prefix")), logits(Recipe())
    np.testing.assert_array_equal(ours, plain)


@pytest.mark.parametrize("head_dim", [16, 40])
def test_internlm2_heads_of_another_width_are_read_from_the_tensors(head_dim):
    recipe = Recipe(style="9b", head_dim=head_dim)
    assert relative_error(logits(recipe), transformers_logits(recipe)) < TOLERANCE


@pytest.mark.parametrize("layout", ["original", "hf_a", "hf_b", "hf_saved", "mlx"])
def test_without_a_head_the_embedding_serves(layout):
    recipe = Recipe(layout=layout, tied=True)
    assert relative_error(logits(recipe), transformers_logits(recipe)) < TOLERANCE


@pytest.mark.parametrize("recipe", PACKED, ids=name_of)
def test_packed_weights_give_the_logits_of_the_numbers_they_stand_for(recipe):
    dense = Recipe(**{**vars(recipe), "dequantised": True})
    packed, unpacked = logits(recipe), logits(dense)
    assert relative_error(packed, unpacked) < TOLERANCE
    assert relative_error(packed, transformers_logits(recipe)) > 1e-4  # it was packed


def test_modules_with_bits_of_their_own_are_read_with_them():
    recipe = Recipe(layout="mlx", bits=Bits(overrides=MIXED))
    dense = Recipe(layout="mlx", bits=Bits(overrides=MIXED), dequantised=True)
    assert relative_error(logits(recipe), logits(dense)) < TOLERANCE


@pytest.mark.parametrize("layout", ["original", "hf_saved", "mlx"])
def test_bfloat16_files_lose_nothing_when_read_as_float32(layout):
    wide = logits(Recipe(layout=layout, dtype="bfloat16"), dtype="float32")
    theirs = transformers_logits(Recipe(layout=layout, dtype="bfloat16"))
    assert relative_error(wide, theirs) < TOLERANCE


def test_bfloat16_is_as_near_to_the_truth_as_transformers_in_bfloat16():
    recipe = Recipe(dtype="bfloat16")
    truth = transformers_logits(recipe)
    ours = relative_error(logits(recipe, dtype="bfloat16"), truth)
    checkpoint = tiny(recipe)
    ids, pixels = token_row(checkpoint, TILES), random_pixels(checkpoint, sum(TILES))
    theirs = relative_error(checkpoint.reference.narrow().logits(ids, pixels)[0], truth)
    assert 0 < ours < 1.5 * theirs < 0.2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_asked_for_is_the_dtype_computed_in(dtype):
    checkpoint = tiny(Recipe())
    vlm = load(str(checkpoint.folder), dtype=dtype)
    out = vlm.model(mx.array([token_row(checkpoint)]))
    assert out.dtype == getattr(mx, dtype)
