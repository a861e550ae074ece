"""A folder of images as a video, as training data often has it: each image is a frame."""

import os
import re
from dataclasses import replace
from pathlib import Path

from internvl3_mlx.errors import ImageError
from internvl3_mlx.images.fetch import APPLE_DOUBLE, shorten_name
from internvl3_mlx.images.load import IMAGE_SUFFIXES, LoadedImage, open_image

FRAME_SECONDS = 1.0  # what a frame is taken to last: a folder does not say
DIGITS = re.compile("([0-9]+)")


def find_frame_folder(source: str | Path | bytes) -> Path | None:
    """Return the folder that a path names; None for a file, bytes, or an address."""
    if isinstance(source, bytes) or not str(source):
        return None
    folder = Path(os.path.expanduser(str(source)))
    try:
        return folder if folder.is_dir() else None
    except (OSError, ValueError):  # too long for a name, or with a zero byte
        return None


def list_frames(folder: Path) -> list[Path]:
    """List a folder's images in the order of the numbers in their names: 2.jpg before 10.jpg.

    Raises ImageError if it has none.
    """
    frames = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(APPLE_DOUBLE)
    ]
    if not frames:
        raise ImageError(
            f"cannot read {shorten_name(str(folder))} as a video: the folder has no images; name "
            "a video, or a folder of its frames"
        )
    return sorted(frames, key=lambda path: natural_order(path.name))


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts numbers in names by their value."""
    parts = DIGITS.split(name)
    return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)]


def open_frame(path: Path, *, upright: bool) -> LoadedImage:
    """Open one image of a folder under a short name. Raises ImageError."""
    return replace(
        open_image(path, upright=upright), name=shorten_name(f"{path.parent.name}/{path.name}")
    )
