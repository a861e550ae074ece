"""iPhone photos must open with pillow-heif, with macOS alone, or say what to install."""

import io
import sys

import numpy as np
import pytest
from fixtures.image_files import held, message
from PIL import Image

from internvl3_mlx.errors import MissingExtraError
from internvl3_mlx.images.load import open_image


@pytest.fixture
def heic():
    import pillow_heif

    exif = held(6)
    buffer = io.BytesIO()
    heif = pillow_heif.from_pillow(Image.new("RGB", (64, 32), (250, 10, 20)))
    heif.save(buffer, quality=100, exif=exif.tobytes())
    return buffer.getvalue()


def test_heic_opens_upright_through_pillow_heif(heic):
    image = open_image(heic).image
    assert image.size == (32, 64)
    assert np.allclose(image.getpixel((5, 40)), (250, 10, 20), atol=6)
    assert open_image(image).image.size == (32, 64)


def test_heic_without_a_reader_names_the_extra(heic, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingExtraError) as caught:
        open_image(heic)
    message = str(caught.value)
    assert message.startswith("cannot read image bytes: HEIC needs pillow-heif; run pip install ")


SIPS = """#!{python}
import sys
from PIL import Image
assert sys.argv[1:4] == ["-s", "format", "tiff"] and sys.argv[5] == "--out"
exif = Image.Exif()
exif[0x0112] = 6
Image.new("RGB", (64, 32), (9, 8, 7)).save(sys.argv[6], exif=exif)
"""


@pytest.fixture
def sips(tmp_path, monkeypatch):
    """Stand in for the macOS converter, on a machine without pillow-heif."""
    tool = tmp_path / "bin" / "sips"
    tool.parent.mkdir()
    tool.write_text(SIPS.format(python=sys.executable))
    tool.chmod(0o755)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setenv("PATH", str(tool.parent))
    return tool


@pytest.mark.parametrize("upright", [True, False])
def test_heic_opens_through_sips(heic, sips, tmp_path, upright):
    path = tmp_path / "-a b.heic"
    path.write_bytes(heic)
    picture = open_image(path, upright=upright)
    assert picture.image.getpixel((3, 3)) == (9, 8, 7)
    assert picture.image.size == (32, 64)  # Pillow turns every TIFF by itself


def test_sips_failing_is_told(heic, sips):
    sips.write_text("#!/bin/sh\nexit 1\n")
    assert message(heic) == (
        "cannot read image bytes: sips could not convert it; export it as JPEG"
    )
