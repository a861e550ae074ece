"""The content of one turn: plain text, or OpenAI's list of parts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from internvl3_mlx.prompt.messages import IMAGE_MARK, VIDEO_MARK

MARKS = {"image": IMAGE_MARK, "video": VIDEO_MARK}
# type of a part -> what it is; its name may stand under any key of NAMED, or be left to the row
KINDS = {
    "text": "text",
    "input_text": "text",
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "video": "video",
    "video_url": "video",
}
NAMED = ("path", "url", "image", "image_url", "video", "video_url")
Part = tuple[str, str | None]


class RowFault(Exception):
    """What is wrong with a row, in a user's words."""


@dataclass(frozen=True)
class Content:
    """The text of a turn, and the pictures its parts show; None where the row's list names one."""

    text: str
    images: tuple[str | None, ...] = ()
    videos: tuple[str | None, ...] = ()


def read_content(content: Any, number: int) -> Content:
    """Read the content of turn ``number``.

    Pictures before all text are left to the chat template, which numbers several of them; others
    are marked in the text, each on a line of its own.
    """
    if isinstance(content, str):
        return Content(content)
    if not isinstance(content, list):
        raise RowFault(f"the content of turn {number} is {kind(content)}; wanted text or parts")
    parts = [_part(part, number) for part in content]
    shown = [what != "text" for what, _ in parts]
    if any(shown) and any(what == "text" and _marked(value) for what, value in parts):
        raise RowFault(f"turn {number} has {IMAGE_MARK} marks and picture parts; keep one of them")
    in_front = shown == sorted(shown, reverse=True)
    texts = [value or "" for what, value in parts if what == "text"]
    text = "".join(texts) if in_front else _interleaved(parts)
    images, videos = (tuple(name for what, name in parts if what == mark) for mark in MARKS)
    return Content(text, images, videos)


def kind(value: Any) -> str:
    """Say what a JSON value is."""
    names = {list: "a list", dict: "an object", bool: "true or false", type(None): "null"}
    names[str] = "a text" if value else "an empty text"
    return names.get(type(value), repr(value))


def _part(part: Any, number: int) -> Part:
    """Read one part: what it is, and its text or the name of its picture."""
    what = KINDS.get(str(part.get("type"))) if isinstance(part, dict) else None
    if what is None:
        given = f"of type {part.get('type')!r}" if isinstance(part, dict) else kind(part)
        raise RowFault(f"a part of turn {number} is {given}; wanted {', '.join(KINDS)}")
    if what == "text":
        if not isinstance(part.get("text"), str):
            raise RowFault(f"a text part of turn {number} has no text; wanted it under 'text'")
        return what, part["text"]
    name = next((part[key] for key in NAMED if part.get(key)), None)
    if isinstance(name, dict):  # OpenAI wraps addresses once more
        name = name.get("url")
    if name is not None and not isinstance(name, str):
        raise RowFault(f"a part of turn {number} names a picture by {kind(name)}; wanted its path")
    return what, name


def _marked(text: str | None) -> bool:
    return any(mark in (text or "") for mark in MARKS.values())


def _interleaved(parts: Sequence[Part]) -> str:
    texts = [value or "" if what == "text" else f"{MARKS[what]}\n" for what, value in parts]
    whole = "".join(texts)
    return whole if parts[-1][0] == "text" else whole.removesuffix("\n")
