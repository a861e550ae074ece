"""The size of a picture from its header alone, without reading its pixels."""

import struct
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from internvl3_mlx.images.colour import ORIENTATION, TURNS
from internvl3_mlx.images.fetch import Located, locate
from internvl3_mlx.images.load import FORMATS, Source, one_line, open_picture

SIDEWAYS = frozenset(
    turn
    for turn, how in TURNS.items()
    if how.name in ("TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
)


def picture_size(source: Source, *, upright: bool = True) -> tuple[int, int]:
    """Give (width, height) as ``open_picture`` would; raise ``ImageError`` for what is no picture.

    A picture whose pixels are damaged behind a whole header passes.
    """
    if isinstance(source, str | bytes | Path):
        size = _from_header(locate(source), upright)
        if size is not None:
            return size
    picture = open_picture(source, upright=upright)
    return picture.width, picture.height


def _from_header(located: Located, upright: bool) -> tuple[int, int] | None:
    """Read the header; None where Pillow knows no such format, for the whole reader to judge."""
    Image.init()
    with located.open() as file, one_line(located.name):
        try:
            image = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
        except UnidentifiedImageError:
            return None
        width, height = image.size
        if width < 1 or height < 1:
            return None
        return (height, width) if upright and _turned(image) else (width, height)


def _turned(image: Image.Image) -> bool:
    try:
        return int(image.getexif().get(ORIENTATION, 1)) in SIDEWAYS
    except (OSError, ValueError, TypeError, LookupError, SyntaxError, struct.error):
        return False
