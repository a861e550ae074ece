"""A small copy of a picture, for terminals that can show one."""

import io

from PIL import Image

from internvl3_mlx.images.load import Picture

LONGEST = 480  # pixels of the longer side


def preview_png(picture: Picture, longest: int = LONGEST) -> bytes:
    """Shrink a picture to ``longest`` pixels and write it as PNG."""
    small = picture.image.copy()
    small.thumbnail((longest, longest), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    small.save(file, "PNG")
    return file.getvalue()
