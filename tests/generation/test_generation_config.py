"""Options are checked when they are given, and errors name what is allowed."""

from dataclasses import fields
from typing import get_type_hints

import pytest

from internvl3_mlx.errors import UserError
from internvl3_mlx.generation.generation_config import (
    GenerationConfig,
    GenerationOptions,
    with_overrides,
)

SINGLE_OR_SEVERAL = {"history", "video", "stop", "choice"}  # the config holds tuples of these


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; choose 0 to 100"),
        ({"top_p": 1.5}, "top_p is 1.5; choose 0 to 1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tiles": 0}, "max_tiles is 0"),
        ({"kv_bits": 5}, "kv_bits is 5; choose 4 or 8, or None"),
        ({"kv_group_size": 48}, "kv_group_size is 48; choose 32, 64 or 128"),
        ({"prefill_step_size": 0}, "prefill_step_size is 0"),
        ({"regex": "a", "choice": "b"}, "regex and choice are mutually exclusive; choose one"),
        ({"regex": "a", "lookup": True}, "cannot be combined with regex; drop lookup"),
    ],
)
def test_invalid_values_are_named_with_what_is_allowed(options, message):
    with pytest.raises(UserError, match=message):
        GenerationConfig(**options)


def test_an_unknown_option_is_refused_with_the_nearest_name():
    message = "unknown generation option 'temprature'; did you mean temperature?"
    with pytest.raises(UserError, match=message):
        with_overrides(GenerationConfig(), {"temprature": 1})


def test_a_single_value_is_a_list_of_one():
    assert with_overrides(GenerationConfig(), {"stop": "END"}).stop == ("END",)
    assert with_overrides(GenerationConfig(), {"video": "clip.mp4"}).video == ("clip.mp4",)


def test_overrides_leave_the_other_options_alone():
    base = GenerationConfig(max_tokens=5, top_k=3)
    assert with_overrides(base, {"top_k": 4}) == GenerationConfig(max_tokens=5, top_k=4)


def test_the_typed_keywords_are_the_fields_of_the_config():
    keywords, hints = get_type_hints(GenerationOptions), get_type_hints(GenerationConfig)
    assert list(keywords) == [field.name for field in fields(GenerationConfig)]
    same = {name for name in hints if keywords[name] == hints[name]}
    assert hints.keys() - same == SINGLE_OR_SEVERAL
