"""Open every page of a file: those of a PDF, and those of a TIFF of several pages."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from PIL import Image

from internvl3_mlx.errors import ImageError
from internvl3_mlx.images.fetch import locate
from internvl3_mlx.images.load import (
    LoadedImage,
    check_size,
    convert_upright,
    one_line_errors,
    open_header,
    open_located,
)
from internvl3_mlx.images.pdf import MAX_PAGES, read_pages
from internvl3_mlx.native_output import native_errors_hidden

TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_PAGE_PIXELS = 600_000_000  # 64 scanned pages at 300 dpi; 1.8 GB
PDF_SUFFIX = ".pdf"
NEW_SUBFILE_TYPE, REDUCED_RESOLUTION = 254, 1  # TIFF 6.0, page 36


def open_pages(source: str | Path | bytes, *, upright: bool = True) -> list[LoadedImage]:
    """Open an image, every page of a PDF, or every page of a TIFF.

    Raises ``ImageError`` for a damaged file or too many pages.
    """
    if isinstance(source, str | Path) and str(source).lower().split("?")[0].endswith(PDF_SUFFIX):
        return read_pages(source)
    located = locate(source)
    with located.open() as file:
        if file.read(4) not in TIFF_HEADS:
            return [open_located(located, upright=upright)]
        file.seek(0)
        with one_line_errors(located.name), native_errors_hidden():
            document = open_header(file, located.name, ["TIFF"])
            return [*_tiff_pages(document, located.name, upright)]


def _tiff_pages(document: Image.Image, name: str, upright: bool) -> Iterator[LoadedImage]:
    """Yield the pages, without reduced copies of them, which the format allows as pages too."""
    count = int(getattr(document, "n_frames", 1))
    if count > MAX_PAGES:
        raise ImageError(
            f"cannot read {name}: {count} pages, but only 1 to {MAX_PAGES} can be "
            "read at once; split the document"
        )
    pixels = 0
    for number in range(count):
        document.seek(number)
        kind = getattr(document, "tag_v2", {}).get(NEW_SUBFILE_TYPE, 0)
        if number and kind & REDUCED_RESOLUTION:
            continue
        check_size(document, name)
        pixels += document.width * document.height
        if pixels > MAX_PAGE_PIXELS and number:
            raise ImageError(
                f"cannot read {name}: its pages have more than {MAX_PAGE_PIXELS // 10**6} "
                "megapixels together; split or shrink the document"
            )
        page = f"{name} page {number + 1}" if count > 1 else name
        loaded = convert_upright(document, page, upright)
        if loaded.image is document:  # into which the next page is decoded
            loaded = replace(loaded, image=document.copy())
        yield loaded
