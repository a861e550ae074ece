"""Pages of a PDF are pictures, or one line says why not."""

import builtins

import pytest
from fixtures.documents import write_pdf

from internvl3_mlx.errors import ImageError, MissingExtraError
from internvl3_mlx.images import pdf
from internvl3_mlx.images.pdf import read_pages


def test_every_page_keeps_its_shape(tmp_path):
    path = write_pdf(tmp_path / "a.pdf", (300, 200), (100, 400))
    first, second = read_pages(path, longer_side=600)
    assert abs(first.width - 600) <= 1
    assert abs(first.height - 400) <= 1
    assert abs(second.height - 600) <= 1
    assert second.name == f"{path} page 2"
    assert first.image.mode == "RGB"


def test_a_document_of_too_many_pages_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pdf, "MAX_PAGES", 1)
    path = write_pdf(tmp_path / "a.pdf", (10, 20), (10, 20))
    with pytest.raises(ImageError, match="a.pdf: 2 pages, but only 1 to 1 can be read at once"):
        read_pages(path)


def test_what_is_no_pdf_is_told():
    with pytest.raises(ImageError, match="it is damaged or not a PDF"):
        read_pages(b"%PDF-1.4 nothing")


def test_a_locked_document_is_told():
    assert "password-protected" in pdf.pdfium_error_text(
        "Failed to load document (Incorrect password)"
    )


def test_without_the_library_the_line_to_paste_is_given(tmp_path, monkeypatch):
    path = write_pdf(tmp_path / "a.pdf", (10, 20))
    imported = builtins.__import__

    def without(name, *rest):
        if name == "pypdfium2":
            raise ImportError
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match="a PDF needs pypdfium2; run pip install"):
        read_pages(path)


MISSING_PAGE = b"""%PDF-1.4
1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj
2 0 obj<</Type/Pages/Count 2/Kids[3 0 R 9 0 R]>>endobj
3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 30 20]>>endobj
trailer<</Root 1 0 R>>
"""


def test_a_page_that_cannot_be_loaded_is_named():
    with pytest.raises(ImageError, match="image bytes page 2: the page is damaged; save the doc"):
        read_pages(MISSING_PAGE)
