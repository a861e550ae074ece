"""All generation options besides the question itself; each default is written here only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, TypedDict, cast

from internvl3_mlx.errors import UserError
from internvl3_mlx.files import did_you_mean
from internvl3_mlx.prompt.messages import Message
from internvl3_mlx.prompt.reasoning import thinking_system_prompt

KV_BITS = (4, 8)
KV_GROUP_SIZES = (32, 64, 128)
CONSTRAINTS = ("json_schema", "regex", "choice")
LIKELIHOOD, GREEDY = "likelihood", "greedy"
CHOICE_MODES = (LIKELIHOOD, GREEDY)
FLASH_OPTIONS = ("flash_relative_threshold", "flash_absolute_threshold")

V2PEDelta = float | str | Fraction
JSONSchema = Mapping[str, Any] | str | bool


class DraftSource(Protocol):
    """A loaded model that can draft for a larger one: what ``load`` returns."""

    @property
    def name(self) -> str: ...

    @property
    def runner(self) -> object: ...


class VideoFrames(Protocol):
    """A video read before: what ``Conversation.process_video`` returns."""

    @property
    def name(self) -> str: ...

    @property
    def frames(self) -> Sequence[object]: ...


InputVideo = str | Path | bytes | VideoFrames


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How a prompt is built and an answer generated. ``None`` means the model's own default.

    history: earlier messages; their images come first in ``images``.
    video: videos of this question, ``num_frames`` frames each, with ``frame_times`` in the prompt.
    upright: apply the EXIF orientation of photos.
    visual_compression: let a Flash model compress tiles; the thresholds replace the checkpoint's.
    v2pe_delta: position step of image tokens: 1, 1/2 ... 1/256, ``"auto"``, or one per image.
    ntk: extend the rotary base beyond the trained window as the checkpoint's rope_scaling says.
    keep_boxes: keep the tags of grounding answers in the text.
    lookup: speculative decoding by prompt lookup. draft_model: speculative decoding with a smaller
    model, or its name, also that of a text model. Neither changes a greedy answer.
    json_schema, regex, choice: constrain the answer; at most one. A schema is a mapping or JSON
    text. choice_mode: ``likelihood`` scores each choice as a whole answer, ``greedy`` decodes token
    by token within the choices.
    think: ask for a thought before the answer, which becomes ``Answer.reasoning`` and no part of
    the history; it is closed after think_budget tokens. ``THINKING_DEFAULTS`` apply where options
    turn it on. cot: ask for step by step reasoning.
    """

    system: str | None = None
    history: tuple[Message, ...] = ()
    video: tuple[InputVideo, ...] = ()
    num_frames: int = 8
    frame_times: bool = False
    max_tiles: int | None = None
    min_tiles: int | None = None
    thumbnail: bool | None = None
    upright: bool = True
    visual_compression: bool = True
    flash_relative_threshold: float | None = None
    flash_absolute_threshold: float | None = None
    v2pe_delta: V2PEDelta | Sequence[V2PEDelta] = 1
    ntk: bool = True
    max_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    keep_boxes: bool = False
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 0
    prefill_step_size: int | None = None
    lookup: bool = False
    draft_model: str | DraftSource | None = None
    num_draft_tokens: int = 4
    json_schema: JSONSchema | None = None
    regex: str | None = None
    choice: tuple[str, ...] = ()
    choice_mode: str = LIKELIHOOD
    think: bool = False
    think_budget: int | None = None
    cot: bool = False

    def __post_init__(self) -> None:
        for name in ("stop", "video", "history", "choice"):  # one string or path is a list of one
            object.__setattr__(self, name, as_tuple(getattr(self, name)))
        for name, (lowest, highest) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not lowest <= value <= highest:
                raise UserError(f"{name} is {value}; choose {lowest:,} to {highest:,}")
        if self.kv_bits is not None and self.kv_bits not in KV_BITS:
            raise UserError(
                f"kv_bits is {self.kv_bits}; choose 4 or 8, or None for no quantization"
            )
        if self.kv_group_size not in KV_GROUP_SIZES:
            raise UserError(f"kv_group_size is {self.kv_group_size}; choose 32, 64 or 128")
        if self.choice_mode not in CHOICE_MODES:
            raise UserError(
                f"choice_mode is {self.choice_mode}; choose from {', '.join(CHOICE_MODES)}"
            )
        self._check_constraints()
        self._check_thinking()

    @property
    def ranks_choices(self) -> bool:
        """Whether the answer is the most likely of the choices, each scored as a whole."""
        return bool(self.choice) and self.choice_mode == LIKELIHOOD

    @property
    def system_prompt(self) -> str | None:
        """The system prompt with what the thinking mode adds; None for the model's own."""
        return thinking_system_prompt(self.system) if self.think else self.system

    def _check_constraints(self) -> None:
        given = [name for name in CONSTRAINTS if getattr(self, name)]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} are mutually exclusive; choose one")
        if given and (self.lookup or self.draft_model is not None):
            raise UserError(
                f"speculative decoding cannot be combined with {given[0]}; "
                "drop lookup and draft_model"
            )

    def _check_thinking(self) -> None:
        if self.think_budget is not None and not self.think:
            raise UserError(
                f"think_budget is {self.think_budget}, but think is off; set think first, or drop "
                "think_budget"
            )
        if self.think and self.cot:
            raise UserError("think and cot are mutually exclusive; choose one")
        given = next((name for name in CONSTRAINTS if getattr(self, name)), None)
        if self.think and given:
            raise UserError(f"think cannot be combined with {given}; drop one of them")
        if self.think_budget is not None and (self.lookup or self.draft_model is not None):
            raise UserError(
                "think_budget cannot be combined with speculative decoding; drop lookup and "
                "draft_model"
            )


class GenerationOptions(TypedDict, total=False):
    """The fields of ``GenerationConfig`` as keyword arguments; single values need no list."""

    system: str | None
    history: Message | Sequence[Message]
    video: InputVideo | Sequence[InputVideo]
    num_frames: int
    frame_times: bool
    max_tiles: int | None
    min_tiles: int | None
    thumbnail: bool | None
    upright: bool
    visual_compression: bool
    flash_relative_threshold: float | None
    flash_absolute_threshold: float | None
    v2pe_delta: V2PEDelta | Sequence[V2PEDelta]
    ntk: bool
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str]
    keep_boxes: bool
    kv_bits: int | None
    kv_group_size: int
    quantized_kv_start: int
    prefill_step_size: int | None
    lookup: bool
    draft_model: str | DraftSource | None
    num_draft_tokens: int
    json_schema: JSONSchema | None
    regex: str | None
    choice: str | Sequence[str]
    choice_mode: str
    think: bool
    think_budget: int | None
    cot: bool


# sampling while the model thinks, where nothing else is asked for: the temperature is the model
# card's, and so many tokens fit the window of 40,960 beside a few images
THINKING_DEFAULTS: Mapping[str, Any] = {"temperature": 0.6, "max_tokens": 32_768}
UNBOUNDED = 10**9
RANGES: dict[str, tuple[float, float]] = {
    "num_frames": (1, 4096),
    "max_tiles": (1, 4096),
    "min_tiles": (1, 4096),
    "flash_relative_threshold": (0, 1),
    "flash_absolute_threshold": (0, 1),
    "max_tokens": (1, UNBOUNDED),
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (0, UNBOUNDED),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "seed": (0, 2**63),
    "quantized_kv_start": (0, UNBOUNDED),
    "prefill_step_size": (1, UNBOUNDED),
    "num_draft_tokens": (1, 16),
    "think_budget": (1, UNBOUNDED),
}


def with_overrides(config: GenerationConfig, overrides: GenerationOptions) -> GenerationConfig:
    """Return ``config`` with ``overrides``; raise UserError for an unknown name.

    Where they turn ``think`` on or off, the defaults of sampling change with it.
    """
    names = [field.name for field in fields(GenerationConfig)]
    for name in overrides:
        if name not in names:
            raise UserError(f"unknown generation option {name!r}; {did_you_mean(name, names)}")
    given = cast(dict[str, Any], overrides)
    return replace(config, **{**sampling_defaults(config, given), **given})


def sampling_defaults(config: GenerationConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults that thinking changes, if ``overrides`` turn it on or off.

    What has another value than the default was asked for, and stays. Speculation stays greedy.
    """
    think = bool(overrides.get("think", config.think))
    if think == config.think:
        return {}
    plain = {field.name: field.default for field in fields(GenerationConfig)}
    before, after = (plain, THINKING_DEFAULTS) if think else (THINKING_DEFAULTS, plain)
    found = {
        name: after[name] for name in THINKING_DEFAULTS if getattr(config, name) == before[name]
    }
    speculates = (overrides.get(name, getattr(config, name)) for name in ("lookup", "draft_model"))
    if think and any(speculates):
        found.pop("temperature", None)
    return found


def as_tuple(value: object) -> tuple[object, ...]:
    """Return a sequence as a tuple, and a single value as a tuple of one."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        return (value,)
    return tuple(cast(Sequence[object], value))
