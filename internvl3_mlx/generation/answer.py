"""What comes back: the answer, its pieces, and the figures of the run."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from internvl3_mlx.generation.processor import ImageInfo

FinishReason = Literal["stop", "length"]
DECIMALS = 4
COORDINATE_SCALE = 1000  # the model names places in thousandths of the picture's sides


@dataclass(frozen=True)
class Usage:
    """Tokens of a run. ``cached_tokens``: of the prompt, those that were not read again;
    ``drafted_tokens``: guessed ahead, of which ``accepted_tokens`` were right."""

    prompt_tokens: int
    image_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class Timing:
    """Seconds of each stage, and tokens a second of the two that read and write tokens."""

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
    """A region that the answer names, in pixels of the picture and in the model's thousandths."""

    label: str | None
    image: int
    x1: float
    y1: float
    x2: float
    y2: float
    relative: tuple[int, int, int, int]


@dataclass(frozen=True)
class Answer:
    """One finished answer."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    timing: Timing
    model: str
    images: tuple[ImageInfo, ...] = ()
    boxes: tuple[Box, ...] = ()
    peak_memory_gb: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as the command line's ``--json`` prints them."""
        content = round_floats(asdict(self))
        ordered = ("model", "text", "images", "boxes", "finish_reason", "usage", "timing")
        return {key: content[key] for key in (*ordered, "peak_memory_gb")}


@dataclass(frozen=True)
class AnswerChunk:
    """A bit of text as it is made. The last piece carries the whole answer."""

    text: str
    token_id: int | None = None
    answer: Answer | None = field(default=None, repr=False)


def round_floats(value: Any) -> Any:
    """Round the numbers of plain data to what a reader can use."""
    if isinstance(value, dict):
        return {key: round_floats(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [round_floats(entry) for entry in value]
    return round(value, DECIMALS) if isinstance(value, float) else value


def locate_boxes(text: str, images: tuple[ImageInfo, ...]) -> tuple[Box, ...]:
    """Find the boxes in an answer and scale them to the first picture, the one asked about."""
    from internvl3_mlx.prompt.boxes import parse_boxes

    if not images:
        return ()
    width, height = images[0].width, images[0].height
    return tuple(
        Box(
            label,
            0,
            x1 * width / COORDINATE_SCALE,
            y1 * height / COORDINATE_SCALE,
            x2 * width / COORDINATE_SCALE,
            y2 * height / COORDINATE_SCALE,
            (x1, y1, x2, y2),
        )
        for label, (x1, y1, x2, y2) in parse_boxes(text)
    )
