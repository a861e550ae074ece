"""Synthetic photos: JPEG files with a photo's texture, in sizes for which both programs choose the
same grid of tiles."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

JPEG_QUALITY = 90
SIZES = {  # name: (width, height); mlx-vlm takes other grids for squares of about 1 MP and for 720p
    "1 tile": (448, 448),
    "7 tiles": (1344, 896),
    "13 tiles": (800, 600),
    "1 MP": (1152, 864),
    "12 MP": (4000, 3000),
}


def write_photo(folder: Path, name: str) -> Path:
    """Write the photo ``name`` of SIZES into ``folder``, unless it is there already."""
    path = folder / f"{name.replace(' ', '_')}.jpg"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        synthetic_photo(*SIZES[name]).save(path, quality=JPEG_QUALITY)
    return path


def write_album(folder: Path, count: int) -> list[Path]:
    """Write ``count`` different photos of about one megapixel, unless they are there already."""
    paths = [folder / f"album_{number}.jpg" for number in range(count)]
    folder.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(paths):
        if not path.exists():
            synthetic_photo(*SIZES["1 MP"], seed=number).save(path, quality=JPEG_QUALITY)
    return paths


def synthetic_photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Blend grain and soft patches of color, so that decoding takes about as long as for a
    photo."""
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 256, (height // 32 + 1, width // 32 + 1, 3), dtype=np.uint8)
    soft = Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)
    grain = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    noise = Image.fromarray(grain).filter(ImageFilter.GaussianBlur(1.5))
    return Image.blend(soft, noise, 0.3)
