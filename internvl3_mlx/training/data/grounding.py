"""Placeholders and boxes of other tools: convert them to InternVL's form, or refuse them by name.

InternVL writes ``<ref>dog</ref><box>[[x1, y1, x2, y2]]</box>`` with whole numbers from 0 to 1000:
thousandths of the width and height of the image.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from internvl3_mlx.prompt.boxes import COORDINATE_SCALE
from internvl3_mlx.prompt.messages import IMAGE_PLACEHOLDER
from internvl3_mlx.records.json_values import (
    RecordError,
    decode_structured,
    describe_json,
    pluralize,
)

BOX_MARK, REF_MARK = "<bbox>", "<ref-object>"  # of ms-swift, filled from the record's 'objects'
BOX_TAG = re.compile(r"<box>(.*?)</box>", re.DOTALL)
BOX_BODY = re.compile(r"[\[\]\d\s,.()+-]*")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
CORNERS = 4
PIXELS_NOTE = "boxes in pixels converted to thousandths of the image"
SHARES_NOTE = "boxes in shares of the image converted to thousandths"

# Placeholders of other tools, which nobody writes in ordinary text.
FOREIGN_MARKS = re.compile(
    # <image1>, <image_1>, <|image_1|>, <image:0>, <audio 2>
    r"<\|?(?:image|img|picture|video|audio)[ _:-]?\d+\|?>"
    r"|<\|(?:image|video|audio|media|vision)(?:_(?:pad|start|end))?\|>"
    r"|<start_of_image>|<image_soft_token>|<image_placeholder>|<image_token>|<_image_>|<__media__>"
    r"|<ImageHere>|<imagepad>|<im_patch>|<img_context>",
    re.IGNORECASE,
)
# Those that HTML and other text have too: refused in a question that shows images.
QUESTION_MARKS = re.compile(
    r"<img\b[^>]*>|</img>|</image>|<(?:image|video|audio)\s*/>|<image\s[^>]*>|<audio>"
    r"|(?!(?-i:<image>|<video>))<(?:image|video)>|(?-i:\[IMG\])",
    re.IGNORECASE,
)
# marks that a chat template writes around messages
TEMPLATE_MARKS = re.compile(
    r"<\|im_(?:start|end)\|>|</s>|<\|endoftext\|>|<\|eot_id\|>|<end_of_turn>|\[/?INST\]"
)
FOREIGN_BOXES = re.compile(
    r"<\|box_start\|>|<\|object_ref_start\|>|<\|det\|>|<loc_?\d+>|<patch_index_\d+>|<box>\s*\("
    r"|(?!(?-i:<box>))<box>",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Objects:
    """The ``objects`` of an ms-swift record: names and boxes that its placeholders stand for.

    boxes: (x1, y1, x2, y2), in pixels, or in shares of the image with ``normalized``. images: for
    each box the index of its image.
    """

    refs: tuple[str, ...]
    boxes: tuple[tuple[float, ...], ...]
    images: tuple[int, ...]
    normalized: bool

    @property
    def note(self) -> str | None:
        """What to report about the conversion, if there are boxes."""
        if not self.boxes:
            return None
        return SHARES_NOTE if self.normalized else PIXELS_NOTE


def parse_objects(value: Any, texts: Sequence[str], num_images: int) -> Objects | None:
    """Parse ``objects`` and compare it with the placeholders in the texts of a record."""
    value = decode_structured(value)
    marks = {mark: sum(text.count(mark) for text in texts) for mark in (REF_MARK, BOX_MARK)}
    if value in (None, {}, []):
        if any(marks.values()):
            mark = next(mark for mark, count in marks.items() if count)
            raise RecordError(
                f"the text has {mark}, but the record has no 'objects' to fill it with"
            )
        return None
    if not isinstance(value, dict):
        raise RecordError(f"'objects' is {describe_json(value)}; expected ref and bbox")
    kind = value.get("bbox_type") or "real"
    if kind not in ("real", "norm1"):
        raise RecordError(f"'bbox_type' is {kind!r}; expected real (pixels) or norm1 (0 to 1)")
    given = {name: value.get(name) or [] for name in ("bbox", "ref")}
    for name, entries in given.items():
        if not isinstance(entries, list):
            raise RecordError(f"'objects.{name}' is {describe_json(entries)}; expected a list")
    boxes = tuple(_read_corners(box) for box in given["bbox"])
    refs = tuple(str(ref) for ref in given["ref"])
    if (
        kind == "real"
        and any(0 < n < 1 for box in boxes for n in box)
        and max(map(max, boxes)) <= 1
    ):
        raise RecordError(
            "'objects.bbox' has numbers from 0 to 1, but is read as pixels; set 'bbox_type' to "
            "norm1 for shares of the image"
        )
    for name, mark, found in (("ref", REF_MARK, refs), ("bbox", BOX_MARK, boxes)):
        if marks[mark] != len(found):
            raise RecordError(
                f"{pluralize(marks[mark], f'{mark} placeholder')} but {len(found)} in "
                f"'objects.{name}'; give one for each"
            )
    images = _read_image_ids(value.get("image_id"), len(boxes), num_images)
    return Objects(refs, boxes, images, kind == "norm1")


def _read_corners(box: Any) -> tuple[float, ...]:
    numbers = isinstance(box, list) and [type(n) in (int, float) for n in box] == [True] * CORNERS
    if not numbers or not all(map(isfinite, box)):
        raise RecordError(f"'objects.bbox' contains {box!r}; expected [x1, y1, x2, y2]")
    check_order(box, "'objects.bbox' contains")
    return tuple(float(n) for n in box)


def check_order(box: Sequence[float], has: str) -> None:
    """Raise ``RecordError`` for a box whose second corner is not right of and below its first."""
    x1, y1, x2, y2 = box
    if x1 > x2 or y1 > y2:
        raise RecordError(
            f"{has} the box {[*box]}, whose second corner is left of or above its first; expected "
            "[x1, y1, x2, y2], not a width and height"
        )


def _read_image_ids(given: Any, boxes: int, num_images: int) -> tuple[int, ...]:
    images = given or [0] * boxes
    if not isinstance(images, list) or len(images) != boxes:
        raise RecordError(f"'objects.image_id' is {given!r}; expected one number for each box")
    for image in images:
        if type(image) is not int or not 0 <= image < num_images:
            raise RecordError(
                f"a box belongs to image {image!r}, but the record has "
                f"{pluralize(num_images, 'image')}; numbers start at 0"
            )
    return tuple(images)


def fill_objects(
    texts: Iterable[str], objects: Objects, sizes: Sequence[tuple[int, int]]
) -> Iterator[str]:
    """Fill the placeholders of texts in order. sizes: (width, height) of the record's images."""
    refs = (f"<ref>{ref}</ref>" for ref in objects.refs)
    boxes = (
        f"<box>[{_scale(box, objects.normalized, sizes[image])}]</box>"
        for box, image in zip(objects.boxes, objects.images, strict=True)
    )
    for text in texts:
        parts = re.split(f"({REF_MARK}|{BOX_MARK})", text)
        filled = [
            next(refs) if part == REF_MARK else next(boxes) if part == BOX_MARK else part
            for part in parts
        ]
        yield "".join(filled)


def _scale(box: tuple[float, ...], normalized: bool, size: tuple[int, int]) -> list[int]:
    width, height = (1, 1) if normalized else size
    scales = (width, height, width, height)
    found = [round(n / scale * COORDINATE_SCALE) for n, scale in zip(box, scales, strict=True)]
    if not all(0 <= n <= COORDINATE_SCALE for n in found):
        unit = "shares of the image" if normalized else f"pixels of {width} x {height}"
        raise RecordError(f"the box {[*box]} is outside its image, read as {unit}; correct it")
    return found


def check_markup(text: str, role: str) -> None:
    """Raise ``RecordError`` for placeholders and boxes that the model was not trained to read.

    role: "user", "assistant", or "text" for plain text. They are those of a record with media.
    """
    where = {"user": "a question", "assistant": "an answer"}.get(role, "the text")
    mark = FOREIGN_MARKS.search(text)
    if role == "user":
        mark = mark or QUESTION_MARKS.search(text)
    if mark:
        raise RecordError(
            f"{where} has {mark[0][:40]}, a placeholder of another tool; write <image> or <video> "
            "where each belongs, or nothing to put them in front"
        )
    if role == "assistant" and IMAGE_PLACEHOLDER in text:
        raise RecordError(
            f"{where} has {IMAGE_PLACEHOLDER}; only questions show images, so write it there"
        )
    if mark := FOREIGN_BOXES.search(text):
        raise RecordError(
            f"{where} has {mark[0]}, a box format of another tool; write "
            "<ref>name</ref><box>[[x1, y1, x2, y2]]</box> in thousandths of the image"
        )
    if text.count("<box>") != text.count("</box>"):
        raise RecordError(f"{where} has a <box> without its </box>; correct it")
    for tag in BOX_TAG.finditer(text):
        check_box(tag[1], where)


def text_notes(texts: Sequence[str], *, has_media: bool) -> Iterator[str]:
    """Yield what to report about markup that messages keep as it is."""
    if not has_media and any(map(FOREIGN_MARKS.search, texts)):
        yield "a placeholder such as <image1>, but no images; it is read as letters"
    marks = {mark[0] for text in texts for mark in TEMPLATE_MARKS.finditer(text)}
    for mark in sorted(marks):
        yield f"{mark} in a message; it is read as letters, and the chat template adds its own"


def check_box(body: str, where: str) -> None:
    """Raise ``RecordError`` unless a box holds whole numbers from 0 to 1000, four for each box."""
    numbers = NUMBER.findall(body) if BOX_BODY.fullmatch(body) else []
    whole = [int(n) for n in numbers if re.fullmatch(r"\d+", n)]
    if not numbers or len(numbers) % CORNERS:
        raise RecordError(f"{where} has <box>{body[:60]}</box>; expected [[x1, y1, x2, y2]]")
    if len(whole) != len(numbers) or max(whole) > COORDINATE_SCALE:
        raise RecordError(
            f"{where} has the box {body[:60]}; expected whole numbers from 0 to "
            f"{COORDINATE_SCALE}, in thousandths of the image. If these are pixels, write <bbox> "
            "in the text and the numbers in 'objects', and they are converted"
        )
    for start in range(0, len(whole), CORNERS):
        check_order(whole[start : start + CORNERS], f"{where} has")
