"""Whatever people hand over must open, or fail with one line that says what to do."""

import base64
import io
import random
import re
import subprocess
import sys
import warnings

import pytest
from fixtures.image_files import encoded, held, message, noise, png_claiming, same
from PIL import Image, ImageGrab

from internvl3_mlx.errors import ImageError
from internvl3_mlx.images.load import LoadedImage, image_size, open_image


def test_every_way_in_gives_the_same_picture(tmp_path, monkeypatch):
    image = noise()
    data = encoded(image)
    path = tmp_path / "my cat (1)%.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    url_safe = base64.urlsafe_b64encode(data).decode().rstrip("=")
    percent = "".join(f"%{byte:02x}" for byte in data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    ways = [
        (path, str(path)),
        (str(path), str(path)),
        (path.as_uri(), str(path)),
        (path.as_uri().replace("file://", "FILE://localhost"), str(path)),
        (data, "image bytes"),
        (bytearray(data), "image bytes"),
        (f"data:image/png;base64,{text}", "data:image/png"),
        (f"data:image/png;charset=x;BASE64,{url_safe[:30]}\n {url_safe[30:]}", "data:image/png"),
        (f"data:;base64,{text.replace('+', '%2B')}", "data:image"),
        (f"data:image/png,{percent}", "data:image/png"),
        ("-", "standard input"),
        (image, "image"),
    ]
    for source, name in ways:
        picture = open_image(source)
        assert same(picture, image), name
        assert picture.name == name
        assert (picture.width, picture.height) == (7, 5)


def test_a_picture_is_returned_as_it_is():
    picture = LoadedImage(noise(), "mine")
    assert open_image(picture) is picture


def test_an_rgb_image_is_not_copied_nor_changed():
    image = noise()
    assert open_image(image).image is image


def test_the_clipboard_gives_its_image_or_its_first_file(tmp_path, monkeypatch):
    image = noise()
    image.save(tmp_path / "copied.png")
    monkeypatch.setattr(ImageGrab, "grabclipboard", lambda: image)
    assert same(open_image("clipboard"), image)
    monkeypatch.setattr(ImageGrab, "grabclipboard", lambda: [str(tmp_path / "copied.png")])
    assert open_image("clipboard").name.endswith("copied.png")


def test_clipboard_faults_are_told(monkeypatch):
    monkeypatch.setattr(ImageGrab, "grabclipboard", lambda: None)
    assert message("clipboard").startswith("no image in the clipboard: copy one first")

    def broken(error):
        raise error

    monkeypatch.setattr(ImageGrab, "grabclipboard", lambda: broken(NotImplementedError("x")))
    assert "works on macOS, or on Linux with wl-paste or xclip; save the image" in message(
        "clipboard"
    )
    monkeypatch.setattr(
        ImageGrab, "grabclipboard", lambda: broken(ChildProcessError("no\ndisplay"))
    )
    assert "cannot read the clipboard" in message("clipboard")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("#ff0000", "#00ff00")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert open_image(data).image.getpixel((3, 2)) == (255, 0, 0)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_thin_pictures_open(size, kind):
    assert open_image(encoded(Image.new("RGB", size), kind)).image.size == size


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is empty; save or download it again"),
        (b"%PDF-1.7\n...", "it is a PDF; ask about it alone, or export the page as PNG"),
        (b"<?xml version='1.0'?>\n<svg></svg>", "it is an SVG drawing; export it as PNG"),
        (b"<svg xmlns='x'></svg>", "it is an SVG drawing"),
        (b"\n<!DOCTYPE html><p>", "it is a web page; give the URL of the image itself"),
        (b"\0\0\0\x18ftypmp42....", "it is a video; ask about it as a video"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer"),
        (b"hello", "its image format is unknown; export it as JPEG, PNG, WebP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "its image format is unknown"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "the file is damaged"),
    ],
)
def test_a_file_that_is_no_picture_is_told_what_it_is(data, words):
    assert message(data).startswith(f"cannot read image bytes: {words}")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_truncated_file_is_told(kind):
    data = encoded(noise(40, 30), kind)
    assert re.search(r"truncated|damaged|image format", message(data[: len(data) * 2 // 3]))
    assert re.search(r"truncated|damaged|image format", message(data[:20]))


def test_no_damage_escapes_as_another_error():
    rng, told = random.Random(7), []
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO", "TGA"):
        whole = encoded(noise(33, 17), kind)
        for _ in range(60):
            data = bytearray(whole)
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(min(len(data), rng.choice((40, 10**6))))] = rng.randrange(256)
            try:
                open_image(bytes(data))
            except ImageError as error:
                told.append(str(error))
    assert len(told) > 100
    assert not [line for line in told if "\n" in line]


def test_an_image_without_pixels_is_told():
    assert "it has no pixels (0x5)" in message(Image.new("RGB", (0, 5)))


def test_a_closed_image_is_told():
    image = Image.open(io.BytesIO(encoded(noise())))
    image.close()
    assert message(image).startswith("cannot read image: the file is damaged")


def test_a_photo_that_pillow_warns_about_opens_quietly(monkeypatch):
    data = encoded(Image.new("L", (60, 40)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1201)  # Pillow stops at twice this
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(data).width == 60


def test_a_bomb_is_refused_before_it_is_unpacked():
    assert message(png_claiming(30000, 20000)) == (
        "cannot read image bytes: more than 178 megapixels; shrink it first"
    )


def test_a_side_that_no_photo_has_is_refused_before_it_is_decoded():
    said = "a side of 262,145 pixels is longer than 262,144; cut the image, or download it again"
    for size in ((2**18 + 1, 2), (2, 2**18 + 1)):
        data = encoded(Image.new("1", size))
        assert said in message(data)
        with pytest.raises(ImageError, match="a side of 262,145 pixels"):
            image_size(data)


PEAK = """
import resource, sys
from internvl3_mlx.images.tiling import TilePolicy, to_tiles
from internvl3_mlx.images.load import open_image
unit = 1 if sys.platform == "darwin" else 1024
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
picture = open_image(sys.argv[1])
to_tiles(picture.image, TilePolicy())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit // 2**20)
"""


@pytest.mark.parametrize(("orientation", "bound"), [(1, 190), (6, 290)])
def test_a_24_megapixel_photo_stays_bounded_in_memory(tmp_path, orientation, bound):
    """Pillow needs 92 MB for the pixels, twice that while it turns them; no third copy is made."""
    exif = held(orientation)
    path = tmp_path / "photo.jpg"
    noise(60, 40).resize((6000, 4000)).save(path, quality=80, exif=exif)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < bound
