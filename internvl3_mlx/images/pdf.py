"""Pages of a PDF as pictures, through pypdfium2."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from internvl3_mlx.errors import ImageError, MissingExtraError
from internvl3_mlx.images.fetch import ImageBytes, locate
from internvl3_mlx.images.load import LoadedImage

PAGE_PIXELS = 1792  # pixels of a rendered page: four tiles of 448
MAX_PAGES = 64  # some 65,000 image tokens; more is no question but a library


def read_pages(source: str | Path | bytes, *, longer_side: int = PAGE_PIXELS) -> list[LoadedImage]:
    """Render every page; each is named after the document and its number.

    Raises ``ImageError`` for what is no PDF, is locked, empty or too long; ``MissingExtraError``
    without pypdfium2.
    """
    located = locate(source)
    try:
        import pypdfium2  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError(f"cannot read {located.name}: a PDF", "pypdfium2", "pdf") from error
    with located.open() as file:
        data = file.read()
    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        raise ImageError(f"cannot read {located.name}: {pdfium_error_text(str(error))}") from error
    try:
        return [*render_pages(document, located, longer_side)]
    finally:
        document.close()


def render_pages(document: Any, located: ImageBytes, longer_side: int) -> Iterator[LoadedImage]:
    """Yield the pages of a ``PdfDocument`` one by one."""
    count = len(document)
    if not 1 <= count <= MAX_PAGES:
        raise ImageError(
            f"cannot read {located.name}: {count} pages; from 1 to {MAX_PAGES} are read at once, "
            "split the document"
        )
    for number in range(count):
        page = document[number]
        scale = longer_side / max(page.get_size())
        image = page.render(scale=scale).to_pil().convert("RGB")
        page.close()
        yield LoadedImage(image, f"{located.name} page {number + 1}")


def pdfium_error_text(words: str) -> str:
    """Put pdfium's word for what is wrong into ours."""
    if "assword" in words:
        return "it is locked by a password; save a copy without"
    return "it is no PDF, or damaged; save or download it again"
