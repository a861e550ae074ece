"""Render the pages of a PDF as images, with pypdfium2."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from internvl3_mlx.errors import ImageError, MissingExtraError
from internvl3_mlx.images.fetch import ImageBytes, locate
from internvl3_mlx.images.load import LoadedImage

PAGE_PIXELS = 1792  # longer side of a rendered page: four tiles of 448
MAX_PAGES = 64  # about 65,000 image tokens, more than the models' context


def read_pages(source: str | Path | bytes, *, longer_side: int = PAGE_PIXELS) -> list[LoadedImage]:
    """Render every page; each image is named after the document and its page number.

    Raises ``ImageError`` for a file that is not a PDF, locked, empty or too long, and
    ``MissingExtraError`` without pypdfium2.
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
    import pypdfium2

    count = len(document)
    if not 1 <= count <= MAX_PAGES:
        raise ImageError(
            f"cannot read {located.name}: {count} pages, but only 1 to {MAX_PAGES} can be "
            "read at once; split the document"
        )
    for number in range(count):
        name = f"{located.name} page {number + 1}"
        try:
            page = document[number]
            scale = longer_side / max(page.get_size())
            image = page.render(scale=scale).to_pil().convert("RGB")
            page.close()
        except (pypdfium2.PdfiumError, ValueError, ArithmeticError, MemoryError) as error:
            raise ImageError(
                f"cannot read {name}: the page is damaged; save the document again, or give its "
                "pages as images"
            ) from error
        yield LoadedImage(image, name)


def pdfium_error_text(words: str) -> str:
    """Say in our words what pdfium reports."""
    if "assword" in words:
        return "it is password-protected; save a copy without a password"
    return "it is damaged or not a PDF; save or download it again"
