"""Boxes in an answer, in the forms that models write: tags, JSON, plain lists, and pairs.

Tags are InternVL's own form, ``<ref>name</ref><box>[[x1, y1, x2, y2]]</box>``, or those of
Qwen2-VL. Asked for JSON, the models write objects with ``bbox_2d`` or ``bbox`` and ``label``.
Pairs are the corners as Qwen-VL writes them: ``(x1, y1), (x2, y2)``.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

COORDINATE_SCALE = 1000  # coordinates are thousandths of the original image's width and height

Corners = tuple[float, float, float, float]
BoxForm = Literal["tags", "json", "list", "pairs"]
BoxUnit = Literal["thousandths", "fractions"]

BOX_KEYS = ("bbox_2d", "bbox", "box_2d", "box", "bounding_box", "bboxes", "boxes")
LABEL_KEYS = ("label", "name", "ref", "category", "class", "object", "text", "description")
CORNER_KEYS = (  # a box as an object
    ("x1", "y1", "x2", "y2"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("x_min", "y_min", "x_max", "y_max"),
    ("left", "top", "right", "bottom"),
)
MAX_JSON_STARTS = 1000  # brackets that are tried as the start of JSON; bounds the time

_NUMBER = r"\s*[0-9]{1,4}(?:\.[0-9]{0,20})?\s*"
_CORNERS = rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]"
_GROUP = rf"(?:\[\s*{_CORNERS}(?:\s*,\s*{_CORNERS})*\s*\]|{_CORNERS})"
_PAIR = rf"\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)"
_ANY_CORNERS = rf"{_CORNERS}|{_PAIR}"
_OPEN, _CLOSE = r"(?:<box>|<\|box_start\|>)", r"(?:</box>|<\|box_end\|>)"
_BOXES = rf"(?:{_GROUP}|{_PAIR})"
# several boxes of one object follow one another, each in tags of its own
_TAGGED = re.compile(
    r"(?:<ref>|<\|object_ref_start\|>)(?P<label>[^<]*)(?:</ref>|<\|object_ref_end\|>)\s*"
    rf"(?P<boxes>(?:{_OPEN}\s*)?{_BOXES}(?:\s*{_CLOSE}(?:\s*{_OPEN}\s*{_BOXES}\s*{_CLOSE})*)?)"
    rf"|{_OPEN}\s*(?P<unnamed>{_BOXES})"
)


@dataclass(frozen=True)
class TextBox:
    """A box as the text names it.

    corners: x1, y1, x2, y2 in thousandths, whole numbers where they are. form: how it was written.
    unit: what the numbers were, thousandths or fractions of the width and height.
    """

    label: str | None
    corners: Corners
    form: BoxForm
    unit: BoxUnit


def parse_boxes(text: str) -> list[tuple[str | None, Corners]]:
    """Find the boxes of an answer, in order, each with its label (None without one)."""
    return [(box.label, box.corners) for box in read_boxes(text)]


def read_boxes(text: str) -> list[TextBox]:
    """Find the boxes of an answer, in order, with the form in which each is written.

    Invalid boxes are skipped: other than four numbers, beyond 0 to 1000, corners swapped. Four
    numbers of at most 1, of which one is not whole, are fractions of the image.
    """
    found: list[tuple[int, TextBox]] = []
    for readers in (_tagged_boxes, _json_boxes, _listed_boxes, _paired_boxes):
        spans: list[tuple[int, int]] = []
        for start, end, boxes in readers(text):
            found += [(start, box) for box in boxes]
            spans.append((start, end))
        text = _blank(text, spans)
    return [box for _, box in sorted(found, key=lambda entry: entry[0])]


Span = tuple[int, int, list[TextBox]]


def _tagged_boxes(text: str) -> Iterator[Span]:
    for match in _TAGGED.finditer(text):
        label = (match["label"] or "").strip() or None
        boxes = _boxes_in_list(match["boxes"] or match["unnamed"], label, "tags")
        yield *match.span(), boxes


def _listed_boxes(text: str) -> Iterator[Span]:
    for match in re.finditer(_GROUP, text):
        yield *match.span(), _boxes_in_list(match[0], None, "list")


def _paired_boxes(text: str) -> Iterator[Span]:
    for match in re.finditer(_PAIR, text):
        yield *match.span(), _boxes_in_list(match[0], None, "pairs")


def _boxes_in_list(text: str, label: str | None, form: BoxForm) -> list[TextBox]:
    lists = (re.findall(r"[0-9.]+", corners) for corners in re.findall(_ANY_CORNERS, text))
    boxes = (_to_box([float(number) for number in four], label, form) for four in lists)
    return [box for box in boxes if box is not None]


def _json_boxes(text: str) -> Iterator[Span]:
    """Find JSON that holds boxes under a key; lists without a key are left to the plain form."""
    decoder, position = json.JSONDecoder(), 0
    for _ in range(MAX_JSON_STARTS):
        start = re.compile(r"[\[{]").search(text, position)
        if start is None:
            return
        try:
            value, position = decoder.raw_decode(text, start.start())
            boxes = list(_walk(value, None))
        except (ValueError, RecursionError):
            position = start.end()
            continue
        if boxes:
            yield start.start(), position, boxes


def _walk(value: Any, label: str | None) -> Iterator[TextBox]:
    """Yield the boxes of a JSON value. label: what the values around it are called."""
    if isinstance(value, list):
        for entry in value:
            yield from _walk(entry, label)
    elif isinstance(value, dict):
        names = (value[key] for key in LABEL_KEYS if isinstance(value.get(key), str))
        label = next(names, "").strip() or label
        keys = [key for key in BOX_KEYS if key in value]
        for key in keys or value:
            own = label if keys else label or key
            for numbers in _number_lists(value[key]):
                if box := _to_box(numbers, own, "json"):
                    yield box
        corners = _corner_object(value)
        if corners and (box := _to_box(corners, label, "json")):
            yield box
        for key, entry in value.items():
            named = key if key not in BOX_KEYS and _corner_object(entry) else None
            yield from _walk(entry, label or named)


def _corner_object(value: Any) -> list[float] | None:
    """Return the corners of an object that names them one by one, such as {"x1": 10, ...}."""
    if not isinstance(value, dict):
        return None
    for keys in CORNER_KEYS:
        four: list[Any] = [value.get(key) for key in keys]
        if all(type(number) in (int, float) for number in four):
            return four
    return None


def _number_lists(value: Any) -> list[Sequence[float]]:
    """Return one list of numbers as a list of it, a list of such lists as it is, else nothing."""
    if not isinstance(value, list) or not value:
        return []
    lists = value if all(isinstance(entry, list) for entry in value) else [value]
    return [one for one in lists if all(type(number) in (int, float) for number in one)]


def _to_box(numbers: Sequence[float], label: str | None, form: BoxForm) -> TextBox | None:
    """Make a box of four numbers; None if they are not one."""
    if len(numbers) != 4 or not all(0 <= number <= COORDINATE_SCALE for number in numbers):
        return None
    fractions = max(numbers) <= 1 and any(number != int(number) for number in numbers)
    factor = COORDINATE_SCALE if fractions else 1
    x1, y1, x2, y2 = (_whole(round(number * factor, 6)) for number in numbers)
    if x1 > x2 or y1 > y2:
        return None
    return TextBox(label, (x1, y1, x2, y2), form, "fractions" if fractions else "thousandths")


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


def _blank(text: str, spans: list[tuple[int, int]]) -> str:
    """Replace what was read by blanks, so that positions stay."""
    pieces, position = [], 0
    for start, end in spans:
        pieces += [text[position:start], " " * (end - start)]
        position = end
    return "".join([*pieces, text[position:]])
