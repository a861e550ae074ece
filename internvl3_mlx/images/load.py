"""Load an image: whatever the user names becomes one upright RGB image."""

import io
import math
import re
import shutil
import struct
import subprocess
import tempfile
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from internvl3_mlx.errors import ImageError, MissingExtraError
from internvl3_mlx.images.clipboard import copied_file
from internvl3_mlx.images.color import (
    EXIF_TRANSPOSES,
    ORIENTATION_TAG,
    apply_exif_orientation,
    hides_pixels,
    to_rgb,
)
from internvl3_mlx.images.fetch import ImageBytes, locate, shorten_name
from internvl3_mlx.native_output import native_errors_hidden

CLIPBOARD = "clipboard"
# Common formats only: some of Pillow's readers start programs (EPS runs Ghostscript).
PILLOW_FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "MPO"),
    *("JPEG2000", "PPM", "ICO", "ICNS", "PSD", "QOI", "TGA"),
)
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# What Pillow raises for damaged files, besides OSError: its readers trust what they read.
DECODE_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError),
    *(AttributeError, NotImplementedError, RuntimeError, MemoryError, struct.error, zlib.error),
)
HEADER_BYTES = 512
MAX_SIDE = 2**18  # pixels
# First bytes of a file that is not an image: what it is, and what to do.
OTHER_FILE_TYPES = (
    (rb"\A\Z", "it is empty; save or download it again"),
    (rb"\A%PDF", "it is a PDF; ask about it alone, or export the page as PNG"),
    (rb"\A\s*<(\?xml[^>]*>\s*)?(<!--.*?-->\s*)?<?svg", "it is an SVG drawing; export it as PNG"),
    (rb"\A\s*<(!doctype html|html)", "it is a web page; give the URL of the image itself"),
    (rb"\A(....ftyp|\x1aE\xdf\xa3)", "it is a video; ask about it as a video"),
    (rb"\Aversion https://git-lfs", "it is a Git LFS pointer; run git lfs pull first"),
)
SUPPORTED_FORMATS = "export it as JPEG, PNG, WebP, GIF, TIFF, BMP, AVIF or HEIC"
# File names that are taken for images. Their first bytes decide what they are.
IMAGE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif"),
        *(".heic", ".heif", ".jp2", ".ppm", ".ico", ".icns", ".psd", ".qoi", ".tga", ".mpo"),
    )
)


@dataclass(frozen=True, eq=False)
class LoadedImage:
    """An RGB image, with the name the user gave for it.

    note: what of the file was not looked at (transparency, further frames or pages), if anything.
    """

    image: Image.Image
    name: str
    note: str | None = None

    @property
    def width(self) -> int:
        """Width in pixels."""
        return self.image.width

    @property
    def height(self) -> int:
        """Height in pixels."""
        return self.image.height


ImageSource = str | Path | bytes | Image.Image | LoadedImage


def open_image(source: ImageSource, *, upright: bool = True) -> LoadedImage:
    """Open a path, http(s), file or data URL, bytes, PIL image, ``-`` or ``clipboard``.

    Takes the first frame of an animation. Alpha is dropped, not blended, as in training.
    upright: apply the EXIF orientation, which the published preprocessing does not.
    Raises ``ImageError``, and ``MissingExtraError`` for HEIC without a reader.
    """
    if isinstance(source, LoadedImage):
        return source
    if isinstance(source, str) and source == CLIPBOARD:
        source = _clipboard()
    if isinstance(source, Image.Image):
        name = shorten_name(str(getattr(source, "filename", "") or "image"))
        with one_line_errors(name):
            return convert_upright(source, name, upright)
    return open_located(locate(source), upright=upright)


def open_located(located: ImageBytes, *, upright: bool = True) -> LoadedImage:
    """Open bytes that were found or downloaded before, as ``open_image`` does."""
    with located.open() as file, one_line_errors(located.name):
        image = _decode(file, located)
        further = describe_frames(image)
        loaded = convert_upright(image, located.name, upright)
        notes = [note for note in (further, loaded.note) if note]
        return replace(loaded, note="; ".join(notes) or None)


def _clipboard() -> Image.Image | str:
    """Return the path of the file copied to the clipboard, or the image in it."""
    from PIL import ImageGrab

    if (path := copied_file()) is not None:
        return path
    try:
        found = ImageGrab.grabclipboard()
    except NotImplementedError as error:
        raise ImageError(
            "cannot read the clipboard: it works on macOS, or on Linux with wl-paste or xclip; "
            "save the image and give its path"
        ) from error
    except DECODE_ERRORS as error:
        raise ImageError(
            f"cannot read the clipboard: {_error_text(error)}; save the image and give its path"
        ) from error
    if not found:
        raise ImageError("no image in the clipboard: copy one first, or give its path")
    return found[0] if isinstance(found, list) else found


@contextmanager
def one_line_errors(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises into an ImageError of one line; suppress its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"cannot read {name}: more than {2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6} "
            "megapixels; shrink it first"
        ) from error
    except DECODE_ERRORS as error:
        raise ImageError(
            f"cannot read {name}: {_error_text(error)}; save or download it again"
        ) from error


def _error_text(error: BaseException) -> str:
    """Say in a few words, on one line, what is wrong with a file."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if "truncated" in text.lower():
        return "the file is truncated"
    return f"the file is damaged ({' '.join(text.split())})"


def _decode(file: BinaryIO, located: ImageBytes) -> Image.Image:
    """Decode the file in its own mode and size."""
    try:
        image = open_header(file, located.name, PILLOW_FORMATS)
    except UnidentifiedImageError as error:
        file.seek(0)
        head = file.read(HEADER_BYTES)
        if head[4:8] == b"ftyp" and head[8:12] in HEIC_BRANDS:
            return decode_heic(located)
        raise ImageError(f"cannot read {located.name}: {_describe_other_file(head)}") from error
    # libtiff writes its own words about damage
    with native_errors_hidden() if image.format == "TIFF" else nullcontext():
        image.load()
    return image


def open_header(file: BinaryIO, name: str, formats: Sequence[str]) -> Image.Image:
    """Open an image of one of Pillow's ``formats`` without decoding it, and check its size."""
    Image.init()  # registers readers beyond the five common ones; cheap after the first time
    image = Image.open(file, formats=[known for known in formats if known in Image.OPEN])
    check_size(image, name)
    return image


def check_size(image: Image.Image, name: str) -> None:
    """Raise ImageError or Pillow's DecompressionBombError for an image, or a page, too large.

    Pillow takes minutes for very long rows, and checks the first page only.
    """
    if image.width * image.height > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
        raise Image.DecompressionBombError
    if max(image.size) > MAX_SIDE:
        raise ImageError(
            f"cannot read {name}: a side of {max(image.size):,} pixels is longer than "
            f"{MAX_SIDE:,}; cut the image, or download it again if it should be smaller"
        )


def _describe_other_file(head: bytes) -> str:
    """Say what a file that is not an image seems to be."""
    for pattern, words in OTHER_FILE_TYPES:
        if re.search(pattern, head, re.IGNORECASE | re.DOTALL):
            return words
    return f"its image format is unknown; {SUPPORTED_FORMATS}"


def convert_upright(image: Image.Image, name: str, upright: bool) -> LoadedImage:
    """Apply the orientation and convert to RGB, copying only where needed."""
    image.load()
    if image.width < 1 or image.height < 1:
        raise ImageError(
            f"cannot read {name}: it has no pixels ({image.width}x{image.height}); check the file"
        )
    note = TRANSPARENCY_NOTE if hides_pixels(image) else None
    rgb = to_rgb(apply_exif_orientation(image) if upright else image)
    return LoadedImage(rgb, name, note)


def describe_frames(image: Image.Image) -> str | None:
    """Say which pages or frames of an open file are not looked at; None if there are no others."""
    kind = FRAME_NAMES.get(image.format or "")
    try:
        if kind is None or not getattr(image, "is_animated", False):
            return None
        count = int(getattr(image, "n_frames", 1)) if image.format != "GIF" else None
    except DECODE_ERRORS:
        return None
    return f"only the first of {count or 'several'} {kind} is looked at"


TRANSPARENCY_NOTE = "transparency is ignored, so what it hides is visible to the model"
# What the parts of a file are called. The second image of an MPO is a copy or a depth map.
FRAME_NAMES = {"TIFF": "pages", **dict.fromkeys(("GIF", "PNG", "WEBP", "AVIF"), "frames")}
SIPS_TIMEOUT_S = 60


def decode_heic(located: ImageBytes) -> Image.Image:
    """Decode the primary image. pillow-heif applies the orientation, sips keeps it as EXIF data."""
    try:
        import pillow_heif
    except ImportError:
        return _by_sips(located)
    with located.open() as file:
        heif = pillow_heif.open_heif(file)
        width, height = heif.size
        if Image.MAX_IMAGE_PIXELS and width * height > 2 * Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError
        return heif.to_pillow()


def _by_sips(located: ImageBytes) -> Image.Image:
    """Convert to TIFF with macOS's sips, which keeps all pixels and EXIF data."""
    sips = shutil.which("sips")
    if sips is None:
        raise MissingExtraError(f"cannot read {located.name}: HEIC", "pillow-heif", "heic")
    with tempfile.TemporaryDirectory(prefix="internvl3-") as folder:
        given, made = Path(folder, "given.heic"), Path(folder, "made.tiff")
        with located.open() as source, given.open("wb") as target:
            shutil.copyfileobj(source, target)
        command = [sips, "-s", "format", "tiff", str(given), "--out", str(made)]
        try:
            subprocess.run(command, capture_output=True, timeout=SIPS_TIMEOUT_S, check=True)
        except subprocess.SubprocessError as error:
            raise ImageError(
                f"cannot read {located.name}: sips could not convert it; export it as JPEG"
            ) from error
        with made.open("rb") as file:
            image = Image.open(file)
            image.load()
            return image


SIDEWAYS_ORIENTATIONS = frozenset(
    turn
    for turn, how in EXIF_TRANSPOSES.items()
    if how.name in ("TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
)


def image_size(source: ImageSource, *, upright: bool = True) -> tuple[int, int]:
    """Return the (width, height) that ``open_image`` would; raise ``ImageError`` for other files.

    Only the header is read where possible, so damaged pixels go unnoticed.
    """
    if isinstance(source, str | bytes | Path):
        size = _from_header(locate(source), upright)
        if size is not None:
            return size
    picture = open_image(source, upright=upright)
    return picture.width, picture.height


def _from_header(located: ImageBytes, upright: bool) -> tuple[int, int] | None:
    """Read the size from the header; None where Pillow does not know the format."""
    with located.open() as file, one_line_errors(located.name):
        try:
            image = open_header(file, located.name, PILLOW_FORMATS)
        except UnidentifiedImageError:
            return None
        width, height = image.size
        if width < 1 or height < 1:
            return None
        return (height, width) if upright and _is_sideways(image) else (width, height)


def _is_sideways(image: Image.Image) -> bool:
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1)) in SIDEWAYS_ORIENTATIONS
    except (OSError, ValueError, TypeError, LookupError, SyntaxError, struct.error):
        return False


def enlarge(picture: LoadedImage, factor: int) -> LoadedImage:
    """Scale an image up by a whole factor, bilinearly."""
    size = (picture.width * factor, picture.height * factor)
    return replace(picture, image=picture.image.resize(size, Image.Resampling.BILINEAR))


PREVIEW_PIXELS = 480  # of the longer side


def preview_png(picture: LoadedImage, longest: int = PREVIEW_PIXELS) -> bytes:
    """Shrink an image to ``longest`` pixels and return it as PNG."""
    return _encode(picture, longest, "PNG")


def preview_jpeg(picture: LoadedImage, longest: int = PREVIEW_PIXELS) -> bytes:
    """Shrink an image to ``longest`` pixels and return it as JPEG."""
    return _encode(picture, longest, "JPEG")


def png_bytes(pixels: np.ndarray) -> bytes:
    """Encode an image (H, W, 3) uint8 as PNG."""
    return _encoded(Image.fromarray(pixels), "PNG")


def _encode(picture: LoadedImage, longest: int, form: str) -> bytes:
    small = picture.image.copy()
    small.thumbnail((longest, longest), Image.Resampling.BICUBIC)
    return _encoded(small, form)


def _encoded(image: Image.Image, form: str) -> bytes:
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()
