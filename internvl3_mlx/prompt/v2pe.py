"""V2PE: positions that grow by a fraction per visual token (arXiv 2412.09616; InternVL3, sec. 2.1).

Positions are float32 and must stay so: bfloat16 has no 257, and no 2 + 1/256.
"""

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from numbers import Real
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from internvl3_mlx.errors import PromptError

DELTAS = tuple(2.0**-n for n in range(9))  # 1, 1/2, ..., 1/256: the steps seen in training
DELTA_PATTERN = re.compile(r"[0-9]{1,4}(/[1-9][0-9]{0,3})?|[0-9]{0,4}\.[0-9]{1,12}")
DELTA_LIST = ", ".join(str(Fraction(delta)) for delta in DELTAS)


def parse_delta(text: str | float | Fraction) -> float | Literal["auto"]:
    """Parse a step as the user writes it: 1, 0.25, "1/4" or "auto". Raises PromptError."""
    if isinstance(text, str) and text.strip().lower() == "auto":
        return "auto"
    value = _number(text)
    if value not in DELTAS:
        raise PromptError(f"V2PE step {text} is unknown; choose from {DELTA_LIST}, or auto")
    return value


def _number(text: object) -> float:
    """Parse a fraction, a decimal or a number; 0 for anything else."""
    if isinstance(text, str):
        return float(Fraction(text.strip())) if DELTA_PATTERN.fullmatch(text.strip()) else 0.0
    if isinstance(text, bool) or not isinstance(text, Real):
        return 0.0
    return float(text)


def image_spans(ids: ArrayLike, image_id: int) -> list[tuple[int, int]]:
    """List the spans of context tokens, one per image or frame, as (start, stop)."""
    starts, lengths, is_image = _runs(ids, image_id)
    return [
        (int(start), int(start + length))
        for start, length in zip(starts[is_image], lengths[is_image], strict=True)
    ]


def visual_positions(
    ids: ArrayLike, image_id: int, deltas: float | Sequence[float] = 1.0
) -> NDArray[np.float32]:
    """Compute the positions of a prompt: ids (L,) -> (L,) float32.

    Text steps by 1; the k-th context token of an image is ``k * delta`` after <img>, and the text
    that follows continues from the next whole number. deltas: one for all
    images, or one per image.
    """
    starts, lengths, is_image = _runs(ids, image_id)
    steps = np.ones(len(starts))
    steps[is_image] = _per_image(deltas, int(is_image.sum()))
    advance = np.ceil(lengths * steps)
    before = np.cumsum(advance) - advance - 1
    within = np.arange(lengths.sum()) - np.repeat(starts, lengths) + 1
    positions = np.repeat(before, lengths) + np.repeat(steps, lengths) * within
    return positions.astype(np.float32)


def auto_delta(ids: ArrayLike, image_id: int, window: int) -> float:
    """Choose the largest step whose last position stays below ``window``."""
    _, lengths, is_image = _runs(ids, image_id)
    text = int(lengths[~is_image].sum())
    visual = lengths[is_image]
    for delta in DELTAS:
        if text + np.ceil(visual * delta).sum() <= window:
            return delta
    raise PromptError(
        f"{text} text tokens and {int(visual.sum())} image tokens do not fit a context of {window} "
        f"even at a V2PE step of {Fraction(DELTAS[-1])}; shorten the text or send fewer images"
    )


def next_position(positions: ArrayLike) -> float:
    """Return the position of the first generated token; later ones step by 1."""
    last = np.asarray(positions, dtype=np.float32)[-1:]
    return math.ceil(last[0]) + 1.0 if last.size else 0.0


def _runs(
    ids: ArrayLike, image_id: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Split ids (L,) into runs of text or image tokens: starts, lengths, is_image, each (R,)."""
    is_image = np.asarray(ids) == image_id
    changes = np.flatnonzero(is_image[1:] != is_image[:-1]) + 1
    starts = np.concatenate([np.zeros(min(1, is_image.size), np.int64), changes])
    lengths = np.diff(np.append(starts, is_image.size))
    return starts, lengths, is_image[starts]


def _per_image(deltas: float | Sequence[float], images: int) -> NDArray[np.float64]:
    if isinstance(deltas, (int, float, str, Fraction, np.floating)):
        given: list[float] = [deltas] * images
    else:
        given = list(deltas)
    if len(given) != images:
        raise PromptError(
            f"{len(given)} V2PE steps for {images} images; give one for all, or one per image"
        )
    return np.array([_step(delta) for delta in given], dtype=np.float64)


def _step(delta: float) -> float:
    step = parse_delta(delta)
    if step == "auto":
        raise PromptError(
            "V2PE step auto cannot be used here; choose the step with auto_delta first"
        )
    return step
