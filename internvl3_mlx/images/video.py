"""Choose frames of a video and read them: films through PyAV, animations through Pillow."""

import re
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from internvl3_mlx.errors import UserError
from internvl3_mlx.images.animation import read_animation
from internvl3_mlx.images.film import read_film
from internvl3_mlx.images.fetch import locate
from internvl3_mlx.images.load import Picture
from internvl3_mlx.images.taken import Taken

MOST_FRAMES = 512  # 131,072 image tokens, four times the context the models were trained on
FOREVER_S = 100_000.0  # the published bound of a video without one
ANIMATIONS = re.compile(rb"GIF8|RIFF....WEBP|\x89PNG", re.DOTALL)

Bound = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame, and when it is shown: seconds from the start of the video."""

    picture: Picture
    seconds: float


def read_frames(
    source: str | Path | bytes,
    num_frames: int,
    *,
    bound: Bound | None = None,
    upright: bool = True,
) -> list[Frame]:
    """Read ``num_frames`` frames spread evenly over a video, or over ``bound`` (seconds).

    A video of fewer frames gives some of them twice. Only the groups of pictures that hold a
    chosen frame are decoded, and only chosen frames are kept, at full size.
    """
    if not 1 <= num_frames <= MOST_FRAMES:
        raise UserError(f"cannot take {num_frames} frames of a video: wanted 1 to {MOST_FRAMES}")
    located = locate(source)
    with located.open() as file:
        animated = ANIMATIONS.match(file.read(16))

    def choose(count: int, fps: float) -> list[int]:
        return frame_indices(num_frames, fps, count - 1, bound=bound)

    taken = read_animation(located, choose) if animated else read_film(located, choose, upright)
    return _frames(located.name, taken)


def frame_indices(
    num_frames: int, fps: float, last_frame: int, *, bound: Bound | None = None, first: int = 0
) -> list[int]:
    """Choose the middle of ``num_frames`` equal parts, rounded as the published ``get_index`` does.

    ``bound`` is (start, end) in seconds; halves are rounded to even, then the sum is cut down.
    """
    start, end = bound or (-FOREVER_S, FOREVER_S)
    low, high = max(first, round(start * fps)), min(round(end * fps), last_frame)
    if high < low:
        raise UserError(
            f"no frames between {start:g} and {end:g} seconds: the video ends at "
            f"{last_frame / fps:.1f}; choose a start before its end"
        )
    part = (high - low) / num_frames
    return [int(low + part / 2 + np.round(part * k)) for k in range(num_frames)]


def _frames(name: str, taken: Taken) -> list[Frame]:
    """Put frames in order; one that could not be decoded is replaced by the one before it."""
    numbers = sorted(taken.images)
    frames = []
    for index in taken.indices:
        number = numbers[max(0, bisect_right(numbers, index) - 1)]
        seconds = taken.seconds[number]
        picture = Picture(taken.images[number], f"{name} at {seconds:.1f} s")
        frames.append(Frame(picture, seconds))
    return frames
