"""Boxes in an answer: ``<ref>name</ref><box>[[x1, y1, x2, y2]]</box>``, or bare ``[[...]]``."""

import re

COORDINATE_SCALE = 1000  # coordinates are thousandths of the original image's width and height

Corners = tuple[int, int, int, int]

_NUMBER = r"\s*[0-9]{1,4}\s*"
_CORNERS = rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]"
_BOXES = re.compile(
    r"(?:<ref>(?P<label>[^<]*)</ref>\s*)?"
    rf"(?:<box>\s*(?P<single>{_CORNERS})\s*</box>"
    rf"|(?:<box>\s*)?\[\s*(?P<list>{_CORNERS}(?:\s*,\s*{_CORNERS})*)\s*\])"
)


def parse_boxes(text: str) -> list[tuple[str | None, Corners]]:
    """Find the boxes of an answer, in order, each with its label (None without a tag).

    Invalid boxes are skipped: other than four numbers, beyond 0 to 1000, corners swapped.
    """
    found: list[tuple[str | None, Corners]] = []
    for match in _BOXES.finditer(text):
        label = (match["label"] or "").strip() or None
        for corners in re.findall(_CORNERS, match["single"] or match["list"]):
            x1, y1, x2, y2 = (int(number) for number in re.findall(r"[0-9]+", corners))
            if x1 <= x2 <= COORDINATE_SCALE and y1 <= y2 <= COORDINATE_SCALE:
                found.append((label, (x1, y1, x2, y2)))
    return found
