"""Every kind of image must come out as the upright RGB picture a person would see."""

import warnings

import numpy as np
import pytest
from fixtures.image_files import encoded, held, noise, same
from PIL import Image

from internvl3_mlx.images.load import open_image

# One bright corner tells every turn apart: where the stored top left corner must end up.
UPRIGHT_CORNER = {
    1: "top left",
    2: "top right",
    3: "bottom right",
    4: "bottom left",
    5: "top left",
    6: "top right",
    7: "bottom right",
    8: "bottom left",
}


def corner(image):
    grey = np.asarray(image.convert("L")).astype(int)
    row, column = np.unravel_index(grey.argmax(), grey.shape)
    return f"{'bottom' if row else 'top'} {'right' if column else 'left'}"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", UPRIGHT_CORNER)
def test_photos_are_upright(kind, orientation):
    stored = Image.new("RGB", (48, 32))
    stored.paste((255, 255, 255), (0, 0, 16, 16))
    exif = held(orientation)
    picture = open_image(encoded(stored, kind, exif=exif))
    assert corner(picture.image.resize((2, 2))) == UPRIGHT_CORNER[orientation]
    assert picture.image.size == ((32, 48) if orientation > 4 else (48, 32))
    again = open_image(picture.image)
    assert same(again, picture.image)


def test_upright_false_leaves_the_photo_as_stored():
    exif = held(6)
    data = encoded(noise(8, 16), exif=exif)
    assert open_image(data).image.size == (16, 8)
    assert open_image(data, upright=False).image.size == (8, 16)


def test_damaged_exif_does_not_matter():
    data = encoded(noise(16, 8), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff\x01")
    assert open_image(data).image.size == (16, 8)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_ordinary_modes_equal_pillows_conversion(mode):
    image = noise(9, 4).convert(mode)
    assert same(open_image(image), image)


def test_alpha_is_dropped_not_blended():
    image = Image.new("RGBA", (2, 3), (200, 100, 50, 0))
    assert open_image(encoded(image)).image.getpixel((1, 2)) == (200, 100, 50)
    for mode in ("RGBa", "La"):
        assert open_image(Image.new(mode, (2, 3))).image.mode == "RGB"


@pytest.mark.parametrize("transparency", [0, bytes([0, 128, 255])])
def test_a_transparent_palette_raises_no_warning(transparency):
    image = noise(9, 4).quantize(16)
    data = encoded(image, transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = open_image(data)
    assert same(picture, image)


def test_sixteen_bit_gray_keeps_its_high_byte():
    deep = Image.fromarray(np.array([[0, 255, 256, 0x8000, 65535]], dtype=np.uint16))
    for source in (deep, encoded(deep), encoded(deep, "TIFF")):
        grey = np.asarray(open_image(source).image)[0, :, 0]
        assert grey.tolist() == [0, 0, 1, 0x80, 255]
    colour = np.asarray(open_image(encoded(deep)).image)
    assert (colour == colour[..., :1]).all()


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([0, 7, 255], [0, 7, 255]),
        ([0, 512, 1023], [0, 128, 255]),
        ([1, 2048, 4095], [0, 128, 255]),
        ([0, 8192, 16383], [0, 128, 255]),
        ([-5, 0x1234, 65535], [0, 0x12, 255]),
        ([0, 2**30, 2**31 - 1], [0, 128, 255]),
    ],
)
def test_whole_numbers_are_scaled_by_the_depth_that_holds_them(values, wanted):
    image = Image.fromarray(np.array([values], dtype=np.int32))
    assert np.asarray(open_image(image).image)[0, :, 0].tolist() == wanted


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([0, 0.5, 1], [0, 128, 255]),
        ([-3, 1.6, 300], [0, 2, 255]),
        ([float("nan"), 9, 1], [0, 9, 1]),
    ],
)
def test_floats_are_scaled_or_clipped(values, wanted):
    image = Image.fromarray(np.array([values], dtype=np.float32))
    assert np.asarray(open_image(image).image)[0, :, 0].tolist() == wanted


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_gray_of_any_depth_in_sixteen_bits_equals_its_high_byte(bits, kind):
    gray = np.arange(35, dtype=np.uint16).reshape(5, 7) * 7
    deep = Image.fromarray(gray << (bits - 8))
    assert (np.asarray(open_image(encoded(deep, kind)).image)[..., 1] == gray).all()


def palette_with(index):
    image = Image.new("P", (3, 2), 1)
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.putpixel((0, 1), index)
    return image


@pytest.mark.parametrize(
    ("source", "hidden"),
    [
        (Image.new("RGBA", (3, 2), (1, 2, 3, 254)), True),
        (Image.new("RGBA", (3, 2), (1, 2, 3, 255)), False),
        (Image.new("LA", (3, 2), (1, 0)), True),
        (encoded(palette_with(0), transparency=0), True),
        (encoded(palette_with(1), transparency=0), False),
        (encoded(palette_with(0), transparency=bytes([128, 255])), True),
        (encoded(palette_with(1), transparency=bytes([128, 255])), False),
        (encoded(Image.new("L", (3, 2), 7), transparency=7), True),
        (encoded(Image.new("RGB", (3, 2), (7, 8, 9)), transparency=(7, 8, 9)), True),
        (encoded(Image.new("RGB", (3, 2), (7, 8, 9)), transparency=(7, 8, 0)), False),
        (noise(9, 4), False),
    ],
)
def test_transparency_is_noted_where_it_hides_something(source, hidden):
    note = open_image(source).note
    assert note == (
        "transparency is ignored, so what it hides is visible to the model" * hidden or None
    )
