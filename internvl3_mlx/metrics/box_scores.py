"""Scores of boxes and points: intersection over union, and a point inside a box."""

import re
from collections.abc import Sequence

Box = tuple[float, float, float, float]  # x1, y1, x2, y2
NO_BOX: Box = (0.0, 0.0, 0.0, 0.0)
THOUSANDTHS = 1000.0
MAX_FRACTION_SUM = 4.0  # four fractions cannot add up to more
MIN_IOU = 0.5  # of a box that counts as found

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX = re.compile(r"\[" + ",".join([_NUMBER] * 4) + r"\]")
_POINT = re.compile(r"[\[(]" + ",".join([_NUMBER] * 2) + r"[\])]")


def first_box(text: str) -> Box:
    """Return the first ``[x1, y1, x2, y2]`` in fractions of the image; ``NO_BOX`` without one.

    Numbers that add up to 4 or more are thousandths, as in InternVL's RefCOCO script.
    """
    match = _BOX.search(text)
    if match is None:
        return NO_BOX
    x1, y1, x2, y2 = (float(number) for number in match.groups())
    scale = THOUSANDTHS if x1 + y1 + x2 + y2 >= MAX_FRACTION_SUM else 1.0
    return (x1 / scale, y1 / scale, x2 / scale, y2 / scale)


def first_point(text: str) -> tuple[float, float] | None:
    """Return the center of the first box, or the first ``[x, y]``, in fractions of the image."""
    if _BOX.search(text):
        x1, y1, x2, y2 = first_box(text)
        return (x1 + x2) / 2, (y1 + y2) / 2
    match = _POINT.search(text)
    if match is None:
        return None
    x, y = float(match[1]), float(match[2])
    scale = THOUSANDTHS if x + y > MAX_FRACTION_SUM / 2 else 1.0
    return x / scale, y / scale


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the intersection over union of two boxes; 0 where both are empty."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    common = width * height
    union = box_area(a) + box_area(b) - common
    return common / union if union > 0 else 0.0


def box_area(box: Sequence[float]) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def in_box(point: Sequence[float], box: Sequence[float]) -> bool:
    """Tell whether a point (x, y) lies in a box, its edges included."""
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]
