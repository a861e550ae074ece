"""Bring any Pillow image to upright 8-bit RGB."""

import struct

import numpy as np
from PIL import Image

ORIENTATION_TAG = 0x0112  # EXIF tag
EXIF_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Modes that Pillow cannot convert to RGB directly, and the mode in between.
INTERMEDIATE_MODES = {"La": "LA", "RGBa": "RGBA"}
OUTPUT_BITS = 8
OPAQUE = 255
MAX_COLORS = 4096  # of an image with a transparent color; one with more is taken to have it
INPUT_BIT_DEPTHS = (8, 10, 12, 14, 16, 31)  # of cameras, scanners and X-rays; 31 is int32


def apply_exif_orientation(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation of a loaded image; without one, return the image as it is."""
    turn = EXIF_TRANSPOSES.get(_orientation(image))
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info = {}  # with its EXIF data, the next reader would rotate the image again
    return turned


def _orientation(image: Image.Image) -> int:
    """Read the EXIF orientation, 1 (upright) if there is none or it is damaged."""
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except (OSError, ValueError, TypeError, LookupError, SyntaxError, struct.error):
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert as ``Image.convert("RGB")`` does, dropping alpha, but scale what exceeds 8 bits.

    Pillow clips 16-bit grayscale at 255, which leaves a white page; here the top 8 bits of the
    depth that holds the largest value are kept, so 12 bits in 16 are not black. Floats within 0..1
    are scaled to 0..255.
    """
    if image.mode == "RGB":
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_integers(image).convert("RGB")
    if image.mode == "F":
        return _from_float(image).convert("RGB")
    if image.mode in INTERMEDIATE_MODES:
        image = image.convert(INTERMEDIATE_MODES[image.mode])
    return image.convert("RGB")


def _from_integers(image: Image.Image) -> Image.Image:
    """Keep the top 8 bits of the smallest depth that holds every value."""
    values = np.asarray(image)
    deep = next(bits for bits in INPUT_BIT_DEPTHS if int(values.max()) < 2**bits)
    gray = np.right_shift(values.clip(0), deep - OUTPUT_BITS)
    return Image.fromarray(gray.astype(np.uint8))


def _from_float(image: Image.Image) -> Image.Image:
    """Round to 8 bits, taking 0..1 for the whole range if nothing exceeds it."""
    values = np.nan_to_num(np.asarray(image), posinf=255.0, neginf=0.0)
    scale = 255.0 if values.max() <= 1.0 else 1.0
    return Image.fromarray((values * scale).clip(0, 255).round().astype(np.uint8))


def hides_pixels(image: Image.Image) -> bool:
    """Return whether any pixel of a loaded image is transparent, wholly or partly."""
    if image.mode in INTERMEDIATE_MODES:
        image = image.convert(INTERMEDIATE_MODES[image.mode])
    if image.mode in ("RGBA", "LA", "PA"):
        return int(image.getchannel("A").histogram()[OPAQUE]) < image.width * image.height
    clear = image.info.get("transparency")
    if clear is None or image.mode not in ("P", "L", "RGB"):
        return False
    if image.mode == "RGB":
        return clear in {color for _, color in image.getcolors(MAX_COLORS) or [(0, clear)]}
    alphas = clear if isinstance(clear, bytes) else {clear: 0}
    counts = image.histogram()
    return any(counts[index] for index in range(256) if alpha_at(alphas, index) < OPAQUE)


def alpha_at(alphas: bytes | dict[int, int], index: int) -> int:
    """Return the alpha of a palette's entry; entries beyond the table are opaque."""
    if isinstance(alphas, bytes):
        return alphas[index] if index < len(alphas) else OPAQUE
    return alphas.get(index, OPAQUE)
