"""The fields of ``GenerationConfig`` as flags, ``/set`` and the config file know them."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, cast

from internvl3_mlx.cli.flags import flag_name
from internvl3_mlx.errors import UserError
from internvl3_mlx.generation.generation_config import (
    CHOICE_MODES,
    GenerationConfig,
    with_overrides,
)
from internvl3_mlx.json_files import parse_json_value
from internvl3_mlx.option_fields import FieldInfo
from internvl3_mlx.user_paths import expand_user, read_small_file

if TYPE_CHECKING:
    from fractions import Fraction

    from internvl3_mlx.generation.generation_config import GenerationOptions


MODEL_DEFAULT = "the model's own"


def parse_deltas(text: str) -> "float | Fraction | str | tuple[Any, ...]":
    """Parse ``--v2pe-delta``: one step for all images, or one per image separated by commas."""
    from internvl3_mlx.prompt.v2pe import parse_delta

    steps = tuple(parse_delta(part.strip()) for part in text.split(","))
    if len(steps) > 1 and "auto" in steps:
        raise UserError(
            f"--v2pe-delta {text}: auto cannot be combined with other steps; "
            "give one step per image, or auto alone"
        )
    return steps[0] if len(steps) == 1 else steps


def read_schema(path: str) -> str:
    """Return the JSON schema in a file as text. Raises UserError if it is not JSON."""
    try:
        text = read_small_file(expand_user(path)).decode("utf-8-sig")
        parse_json_value(text.encode())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}; correct it") from error
    return text


def split_choices(text: str) -> tuple[str, ...]:
    """Split ``A,B,C`` into choices, without blanks around them."""
    return tuple(filter(None, (part.strip() for part in text.split(","))))


# settings that need more than their type to be parsed, on the command line and in /set alike
PARSERS: Mapping[str, Callable[[str], Any]] = {
    "v2pe_delta": parse_deltas,
    "json_schema": read_schema,
    "choice": split_choices,
    "kv_bits": int,
    "kv_group_size": int,
}


# field of GenerationConfig -> type, and how its flag looks
GENERATION_FIELDS: Mapping[str, tuple[type, FieldInfo]] = {
    "system": (str, FieldInfo(
        "Question", 'System prompt; "" for none.',
        default_text=MODEL_DEFAULT, flags=("--system", "--system-prompt"),
    )),
    "max_tokens": (int, FieldInfo(
        "Answer", "Maximum length of the answer, in tokens.", flags=("-m", "--max-tokens"),
    )),
    "temperature": (float, FieldInfo(
        "Answer", "Sampling temperature; 0 is greedy decoding.", flags=("--temp", "--temperature"),
    )),
    "top_p": (float, FieldInfo(
        "Answer", "Sample from the most likely tokens that add up to this probability.",
    )),
    "top_k": (int, FieldInfo("Answer", "Sample from this many tokens; 0 for all.")),
    "min_p": (float, FieldInfo(
        "Answer", "Minimum probability of a token, relative to the most likely one.",
    )),
    "repetition_penalty": (float, FieldInfo("Answer", "Values above 1 discourage repetition.")),
    "seed": (int, FieldInfo("Answer", "Random seed; the same seed gives the same samples.")),
    "stop": (str, FieldInfo("Answer", "Stop before this text; may be repeated.")),
    "keep_boxes": (bool, FieldInfo(
        "Answer", "Keep the <box> and <ref> tags of grounding answers.", flags=("--keep-boxes",),
    )),
    "num_frames": (int, FieldInfo("Images", "Frames taken from each video.")),
    "frame_times": (bool, FieldInfo(
        "Images", "Add the time of each frame to the prompt.", flags=("--frame-times",),
    )),
    "max_tiles": (int, FieldInfo(
        "Images", "Maximum number of tiles per image: detail against speed.",
        default_text=MODEL_DEFAULT,
    )),
    "min_tiles": (int, FieldInfo(
        "Images", "Minimum number of tiles per image.", default_text=MODEL_DEFAULT,
    )),
    "thumbnail": (bool, FieldInfo(
        "Images", "Omit the thumbnail of the whole image.", flags=("--no-thumbnail",),
    )),
    "upright": (bool, FieldInfo(
        "Images", "Ignore the EXIF orientation of photos.", flags=("--no-exif",),
    )),
    "visual_compression": (bool, FieldInfo(
        "Images", "Let a Flash model read tiles without detail in a quarter of the tokens.",
    )),
    "flash_relative_threshold": (float, FieldInfo(
        "Images", "Flash: compress tiles above this quantile of the router's probabilities.",
        default_text=MODEL_DEFAULT,
    )),
    "flash_absolute_threshold": (float, FieldInfo(
        "Images", "Flash: compress tiles of at least this probability.",
        default_text=MODEL_DEFAULT,
    )),
    "v2pe_delta": (str, FieldInfo(
        "Positions", "Position step of image tokens: 1, 1/2 ... 1/256, auto, or one per image "
        "separated by commas.", metavar="STEP",
    )),
    "ntk": (bool, FieldInfo(
        "Positions", "Do not scale the rotary base beyond the trained context.",
        flags=("--no-ntk",),
    )),
    "json_schema": (str, FieldInfo(
        "Answer", "Answer with JSON that matches the schema in this file.", metavar="FILE",
    )),
    "regex": (str, FieldInfo(
        "Answer", "Answer with text that matches a regular expression.", metavar="PATTERN",
    )),
    "choice": (str, FieldInfo("Answer", "Answer with one of these.", metavar="A,B,C")),
    "choice_mode": (str, FieldInfo(
        "Answer", "Choose by the likelihood of whole answers, or decode token by token.",
        choices=CHOICE_MODES,
    )),
    "think": (bool, FieldInfo("Reasoning", "Think before answering; the thought is shown dim.")),
    "think_budget": (int, FieldInfo(
        "Reasoning", "Close the thought after this many tokens and go on to the answer.",
    )),
    "cot": (bool, FieldInfo(
        "Reasoning", "Ask for step by step reasoning and a final answer.",
    )),
    "lookup": (bool, FieldInfo(
        "Speed", "Speculative decoding from earlier text; answers stay the same.",
        flags=("--lookup",),
    )),
    "draft_model": (str, FieldInfo(
        "Speed", "Speculative decoding with a smaller or a text model; greedy answers stay the "
        "same.", metavar="PATH|REPO|SIZE",
    )),
    "num_draft_tokens": (int, FieldInfo("Speed", "Draft tokens per step.")),
    "kv_bits": (str, FieldInfo(
        "Memory", "Quantize the KV cache to this many bits: less memory, not always faster.",
        choices=("4", "8"),
    )),
    "kv_group_size": (str, FieldInfo(
        "Memory", "Group size of the quantized KV cache.", choices=("32", "64", "128"),
    )),
    "quantized_kv_start": (int, FieldInfo(
        "Memory", "Quantize the KV cache once it holds this many tokens.",
    )),
    "prefill_step_size": (int, FieldInfo(
        "Memory", "Prompt tokens processed at a time.", default_text="depends on the device",
    )),
}  # fmt: skip


GENERATION_DEFAULTS = {entry.name: entry.default for entry in fields(GenerationConfig)}


def make_config(options: Mapping[str, Any]) -> GenerationConfig:
    """Return a ``GenerationConfig`` with some options set; raises UserError for an invalid one."""
    return with_overrides(GenerationConfig(), cast("GenerationOptions", options))


def setting_names() -> dict[str, tuple[str, bool]]:
    """Return every spelling without dashes, with its field and what it turns a switch to."""
    found: dict[str, tuple[str, bool]] = {}
    for name, (kind, info) in GENERATION_FIELDS.items():
        found[name.replace("_", "-")] = (name, True)
        if kind is bool and not info.flags:
            found[f"no-{name.replace('_', '-')}"] = (name, False)
        for spelling in info.flags or (flag_name(name),):
            negative = spelling.startswith("--no-")
            found.setdefault(spelling.lstrip("-"), (name, not negative))
    return found
