"""What a reader of videos gives back, and how it is told which frames are wanted."""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from internvl3_mlx.errors import ImageError

# (number of frames, frames per second) -> numbers of the wanted ones
Choose = Callable[[int, float], list[int]]


@dataclass(frozen=True, eq=False)
class Taken:
    """The wanted frame numbers, the images of those decoded, the time in seconds of every frame."""

    indices: list[int]
    images: dict[int, Image.Image]
    seconds: list[float]


def still(name: str) -> ImageError:
    """Say that a picture was given for a video."""
    return ImageError(
        f"cannot read {name} as a video: it is a single picture; ask about it as an image"
    )
