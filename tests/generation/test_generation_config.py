"""What can be set is checked at birth and said back plainly."""

import pytest

from internvl3_mlx.errors import UserError
from internvl3_mlx.generation.generation_config import GenerationConfig, with_overrides


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it goes from 0 to 100"),
        ({"top_p": 1.5}, "top_p is 1.5; it goes from 0 to 1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tiles": 0}, "max_tiles is 0"),
        ({"kv_bits": 5}, "kv_bits is 5; the cache packs to 4 or 8 bits"),
        ({"kv_group_size": 48}, "kv_group_size is 48; MLX has 32, 64 and 128"),
        ({"prefill_step_size": 0}, "prefill_step_size is 0"),
    ],
)
def test_values_out_of_range_are_named_with_their_range(change, message):
    with pytest.raises(UserError, match=message):
        GenerationConfig(**change)


def test_an_unknown_setting_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="no setting 'temprature'; did you mean 'temperature'"):
        with_overrides(GenerationConfig(), {"temprature": 1})


def test_one_string_is_a_list_of_one():
    assert with_overrides(GenerationConfig(), {"stop": "END"}).stop == ("END",)
    assert with_overrides(GenerationConfig(), {"video": "clip.mp4"}).video == ("clip.mp4",)


def test_changes_keep_the_rest():
    base = GenerationConfig(max_tokens=5, top_k=3)
    assert with_overrides(base, {"top_k": 4}) == GenerationConfig(max_tokens=5, top_k=4)
