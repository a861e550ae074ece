"""Every page of a PDF or TIFF is an image; what is not looked at is noted."""

import io
import subprocess
import sys

import numpy as np
import pytest
from fixtures.documents import write_pdf
from fixtures.image_files import noise
from PIL import Image

from internvl3_mlx.errors import ImageError
from internvl3_mlx.images import pages
from internvl3_mlx.images.load import open_image
from internvl3_mlx.images.pages import open_pages

ORIENTATION = 0x0112


def write_pages(path, kind, *images, **options):
    first, *rest = images
    first.save(path, kind, save_all=True, append_images=rest, **options)
    return path


def same(one, other):
    return np.array_equal(np.asarray(one), np.asarray(other.convert("RGB")))


def test_every_page_of_a_tiff_is_an_image_of_its_own(tmp_path):
    images = [noise(9, 4), noise(5, 8).convert("L"), noise(3, 7)]
    path = write_pages(tmp_path / "scan.tif", "TIFF", *images)
    found = open_pages(str(path))
    assert [page.name for page in found] == [f"{path} page {n}" for n in (1, 2, 3)]
    assert all(same(page.image, image) for page, image in zip(found, images, strict=True))
    assert [page.note for page in found] == [None] * 3
    assert same(open_pages(path.read_bytes())[2].image, images[2])


FIRST = {
    "pages.tiff": ("pages", "open_pages(name)"),
    "film.webp": ("video", "read_frames(name, 3)"),
}


@pytest.mark.parametrize("name", FIRST)
def test_a_rarer_format_may_be_the_first_image_of_a_process(tmp_path, name):
    """Pillow registers only five readers by itself, and this process has registered all."""
    first, *others = (noise(30, 20, seed=seed) for seed in range(3))
    first.save(tmp_path / name, save_all=True, append_images=others)
    module, read = FIRST[name]
    code = f"import sys; name = sys.argv[1]; from internvl3_mlx.images.{module} import *"
    command = [sys.executable, "-c", f"{code}; print(len({read}))", str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr


def test_a_tiff_of_one_page_keeps_its_name(tmp_path):
    path = write_pages(tmp_path / "scan.tif", "TIFF", noise(9, 4))
    [page] = open_pages(path)
    assert (page.name, page.note) == (str(path), None)


def test_each_page_has_its_own_orientation(tmp_path):
    turned, upright = Image.new("RGB", (8, 6)), Image.new("RGB", (8, 6))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    turned.encoderinfo = {"exif": exif}
    path = write_pages(tmp_path / "scan.tif", "TIFF", upright, turned)
    assert [page.image.size for page in open_pages(path)] == [(8, 6), (6, 8)]


def test_reduced_copies_are_not_pages(tmp_path):
    small = Image.new("RGB", (4, 3))
    small.encoderinfo = {"tiffinfo": {254: 1}}
    path = write_pages(tmp_path / "scan.tif", "TIFF", noise(9, 4), small)
    assert [page.image.size for page in open_pages(path)] == [noise(9, 4).size]


def test_a_tiff_of_too_many_pages_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "MAX_PAGES", 1)
    path = write_pages(tmp_path / "scan.tif", "TIFF", noise(9, 4), noise(9, 4))
    with pytest.raises(ImageError, match="scan.tif: 2 pages, but only 1 to 1 can be read at once"):
        open_pages(path)


def test_a_truncated_tiff_is_one_line(tmp_path):
    path = write_pages(tmp_path / "scan.tif", "TIFF", noise(90, 40), noise(90, 40))
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(ImageError, match="cannot read .*scan.tif"):
        open_pages(path)


def test_other_files_are_opened_as_before(tmp_path):
    pdf = write_pdf(tmp_path / "a.pdf", (30, 20), (10, 40))
    assert [page.name for page in open_pages(str(pdf))] == [f"{pdf} page 1", f"{pdf} page 2"]
    path = tmp_path / "a.png"
    noise(9, 4).save(path)
    assert same(open_pages(str(path))[0].image, noise(9, 4))
    with pytest.raises(ImageError, match="cannot read image bytes: it is empty"):
        open_pages(b"")


@pytest.mark.parametrize(
    ("kind", "note"),
    [
        ("TIFF", "only the first of 3 pages is looked at"),
        ("PNG", "only the first of 3 frames is looked at"),
        ("WEBP", "only the first of 3 frames is looked at"),
        ("GIF", "only the first of several frames is looked at"),
        ("MPO", None),
    ],
)
def test_an_image_notes_what_comes_after_the_first_frame(kind, note):
    file = io.BytesIO()
    frames = [Image.new("RGB", (8, 6), (shade, 0, shade)) for shade in (0, 90, 200)]
    write_pages(file, kind, *frames)
    assert open_image(file.getvalue()).note == note


def test_what_macos_writes_beside_an_image_is_not_one(tmp_path):
    path = tmp_path / "._cat.png"
    path.write_bytes(b"\0\x05\x16\x07" + bytes(40))
    with pytest.raises(ImageError, match=r"macOS keeps a file's attributes in it; name cat.png"):
        open_image(path)


def test_pages_that_are_too_large_together_are_refused_before_they_are_decoded(
    tmp_path, monkeypatch
):
    path = write_pages(tmp_path / "scan.tif", "TIFF", *[noise(20, 10)] * 4)
    monkeypatch.setattr(pages, "MAX_PAGE_PIXELS", 750)
    with pytest.raises(ImageError, match="scan.tif: its pages have more than 0 megapixels toge"):
        open_pages(str(path))


def test_a_later_page_is_no_bomb_either(tmp_path, monkeypatch):
    path = write_pages(tmp_path / "scan.tif", "TIFF", noise(20, 10), noise(60, 50))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="more than 0 megapixels; shrink it first"):
        open_pages(str(path))
