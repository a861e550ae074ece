"""What generation returns: the answer, its chunks, and the counts and times of the run."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

from internvl3_mlx.generation.processor import ImageInfo
from internvl3_mlx.prompt.boxes import COORDINATE_SCALE, BoxForm, BoxUnit, read_boxes

FinishReason = Literal["stop", "length"]
DECIMALS = 4
OPTIONAL_KEYS = ("reasoning", "choices", "mean_log_prob")


@dataclass(frozen=True)
class Usage:
    """Token counts of one run; runs that differ only in what was compiled are equal.

    ``cached_tokens``: prompt tokens that were in the prompt cache. ``drafted_tokens``: tokens that
    speculative decoding proposed, of which ``accepted_tokens`` were accepted. ``compiled_tokens``:
    tokens that a compiled step chose. ``kernel_speedup``: how many times faster than MLX's our
    attention kernel was measured for such a cache; 0 where it was not measured.
    """

    prompt_tokens: int
    image_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    compiled_tokens: int = field(default=0, compare=False)
    kernel_speedup: float = 0.0


@dataclass(frozen=True)
class Timing:
    """Seconds of each stage, and tokens per second of prefill and decoding."""

    load_s: float = 0.0
    preprocess_s: float = 0.0
    vision_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    first_token_s: float = 0.0
    prefill_tps: float = 0.0
    decode_tps: float = 0.0


@dataclass(frozen=True)
class Box:
    """A region that the answer names.

    x1 to y2: pixels of image number ``image``. ``relative``: the model's own coordinates, in
    thousandths of the image's width and height. ``form``: how the answer wrote the box: ``tags``,
    ``json``, ``list`` or ``pairs``. ``unit``: ``thousandths``, or ``fractions`` where the answer
    wrote those.
    """

    label: str | None
    image: int
    x1: float
    y1: float
    x2: float
    y2: float
    relative: tuple[float, float, float, float]
    form: BoxForm = "tags"
    unit: BoxUnit = "thousandths"


@dataclass(frozen=True)
class ChoiceScore:
    """One of the given choices. ``log_prob``: the mean of its tokens and of the answer's end.

    ``probability``: among the choices.
    """

    text: str
    log_prob: float
    probability: float


@dataclass(frozen=True)
class Answer:
    """One finished answer.

    ``reasoning``: the thought before it; None unless ``think`` was on. ``choices``: the scores of
    all choices, where they were ranked. ``mean_log_prob``: of the tokens, where it was asked for.

    ``peak_memory_gb``: the most that arrays took. ``held_memory_gb``: the most the system saw, with
    the freed buffers that MLX had not returned.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    timing: Timing
    model: str
    images: tuple[ImageInfo, ...] = ()
    boxes: tuple[Box, ...] = ()
    peak_memory_gb: float = 0.0
    held_memory_gb: float = 0.0
    reasoning: str | None = None
    choices: tuple[ChoiceScore, ...] = ()
    mean_log_prob: float | None = None

    @property
    def compressed_tiles(self) -> tuple[int, int] | None:
        """How many tiles a Flash model compressed, and of how many; None for other models."""
        counts = [image.compressed_tiles for image in self.images]
        if all(count is None for count in counts):
            return None
        return sum(count or 0 for count in counts), sum(image.tiles for image in self.images)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as the command line's ``--json`` prints them.

        What was not asked for has no key: ``reasoning``, ``choices``, ``mean_log_prob``.
        """
        content = {key: round_floats(value) for key, value in asdict(self).items()}
        content["images"] = [  # most have no note
            {key: value for key, value in asdict(image).items() if value is not None}
            for image in self.images
        ]
        ordered = ("model", "text", *OPTIONAL_KEYS, "images", "boxes", "finish_reason", "usage")
        absent = {key for key in OPTIONAL_KEYS if content[key] in (None, [])}
        keys = (*ordered, "timing", "peak_memory_gb", "held_memory_gb")
        return {key: content[key] for key in keys if key not in absent}


@dataclass(frozen=True)
class AnswerChunk:
    """A piece of text as it is generated. The last chunk carries the finished answer.

    ``reasoning``: a piece of the thought before the answer.
    """

    text: str
    token_id: int | None = None
    answer: Answer | None = field(default=None, repr=False)
    reasoning: str = ""


def round_floats(value: object) -> object:
    """Round the floats of nested plain data for display."""
    if isinstance(value, dict):
        table = cast(dict[str, object], value)
        return {key: round_floats(entry) for key, entry in table.items()}
    if isinstance(value, list | tuple):
        return [round_floats(entry) for entry in cast(Sequence[object], value)]
    return round(value, DECIMALS) if isinstance(value, float) else value


def locate_boxes(text: str, images: tuple[ImageInfo, ...]) -> tuple[Box, ...]:
    """Find the boxes in an answer and scale them to the first image, the one asked about."""
    if not images:
        return ()
    width, height = images[0].width, images[0].height
    return tuple(
        Box(
            label=found.label,
            image=0,
            x1=found.corners[0] * width / COORDINATE_SCALE,
            y1=found.corners[1] * height / COORDINATE_SCALE,
            x2=found.corners[2] * width / COORDINATE_SCALE,
            y2=found.corners[3] * height / COORDINATE_SCALE,
            relative=found.corners,
            form=found.form,
            unit=found.unit,
        )
        for found in read_boxes(text)
    )
