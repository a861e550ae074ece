"""Read HEIC, the iPhone's format: through pillow-heif if installed, else through macOS ``sips``."""

import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from internvl3_mlx.errors import ImageError, MissingExtraError
from internvl3_mlx.images.fetch import Located

SIPS_TIMEOUT_S = 60


def decode_heic(located: Located) -> Image.Image:
    """Decode the primary image, already upright with pillow-heif, with its EXIF note with sips."""
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


def _by_sips(located: Located) -> Image.Image:
    """Let macOS convert to TIFF, which keeps every pixel and the EXIF note."""
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
