"""One row of training data, in any of the three forms, read into what was said and shown.

    {"messages": [{"role", "content"}], "images": [...]}        OpenAI's, TRL's
    {"conversations": [{"from", "value"}], "image": ...}        LLaVA's, InternVL's
    {"question", "chosen", "rejected", "image": ...}            MMPR's pairs of answers

``image``, ``images``, ``video`` and ``videos`` each take one name or a list of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from internvl3_mlx.prompt.messages import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER

Role = Literal["user", "assistant"]
ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
MediaPaths = tuple[str, ...]


@dataclass(frozen=True)
class ParsedMessage:
    """One turn, and how many of the row's pictures and videos it shows."""

    role: Role
    text: str
    num_images: int = 0
    num_videos: int = 0


@dataclass(frozen=True)
class ParsedRecord:
    """A conversation that ends with an answer; or, with ``answers``, one that ends with a question
    and the two answers to it: the chosen and the rejected one.

    bound: the part of the videos that is watched, in seconds. system: None for the model's own.
    """

    messages: tuple[ParsedMessage, ...]
    images: MediaPaths = ()
    videos: MediaPaths = ()
    clip: tuple[float, float] | None = None
    system: str | None = None
    answers: tuple[str, str] | None = None


def parse_record(value: Any) -> ParsedRecord:
    """Read one row; raise ``RowFault`` with what is wrong and what was wanted."""
    if not isinstance(value, dict):
        raise RecordError(f"{describe_json(value)}; wanted an object in braces")
    found = [name for name, (keys, _) in FORMATS.items() if any(key in value for key in keys)]
    if not found:
        given = ", ".join(map(repr, value)) or "no keys at all"
        raise RecordError(
            f"{given}; wanted 'messages', 'conversations', or 'question' with 'chosen' "
            "and 'rejected'"
        )
    if len(found) > 1:
        raise RecordError(f"both {found[0]} and {found[1]}; a row has one form, remove the other")
    return FORMATS[found[0]][1](value)


def _parse_conversation(record: dict[str, Any]) -> ParsedRecord:
    """Read ``messages`` or ``conversations``; either may name its keys as the other does."""
    key = "messages" if "messages" in record else "conversations"
    entries = record[key]
    if not isinstance(entries, list) or not entries:
        given = "empty" if entries == [] else describe_json(entries)
        raise RecordError(f"{key!r} is {given}; wanted a list of turns")
    turns = [_parse_message(entry, number) for number, entry in enumerate(entries, start=1)]
    system = turns.pop(0)[1].text if turns[0][0] == "system" else None
    roles = [role for role, _ in turns]
    first = 1 + (system is not None)
    for number, role in enumerate(roles):
        wanted = ("user", "assistant")[number % 2]
        if role != wanted:
            raise RecordError(
                f"turn {first + number} is the {role}'s; wanted the {wanted}'s: "
                "user and assistant take turns, a system text comes first"
            )
    if not roles or len(roles) % 2:
        raise RecordError(
            "no answer at the end; wanted an assistant's turn, which is what is learned"
        )
    said, images, videos = _assign_media(
        turns, _read_paths(record, "image"), _read_paths(record, "video")
    )
    _check_not_empty(said, first)
    return ParsedRecord(said, images, videos, _read_clip(record), system)


@dataclass(frozen=True)
class MessageContent:
    """The text of a turn, and the pictures its parts show; None where the row's list names one."""

    text: str
    images: tuple[str | None, ...] = ()
    videos: tuple[str | None, ...] = ()


def _parse_message(
    message: Any, number: int
) -> tuple[Literal["system", "user", "assistant"], MessageContent]:
    if not isinstance(message, dict):
        raise RecordError(
            f"turn {number} is {describe_json(message)}; wanted an object with role and content"
        )
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise RecordError(f"turn {number} has role {role!r}; wanted {', '.join(ROLES)}")
    content = parse_content(message.get("content", message.get("value")), number)
    if ROLES[role] != "user" and (content.images or content.videos):
        raise RecordError(f"turn {number}, the {ROLES[role]}'s, shows a picture; only users' do")
    return ROLES[role], content


def _check_not_empty(messages: Sequence[ParsedMessage], first: int) -> None:
    for number, turn in enumerate(messages, start=first):
        if not turn.text.strip() and not (turn.num_images or turn.num_videos):
            what = "question" if turn.role == "user" else "answer"
            raise RecordError(f"turn {number} is an empty {what}; write it or remove the row")


def _parse_preference(record: dict[str, Any]) -> ParsedRecord:
    """Read MMPR's ``question``, ``chosen`` and ``rejected``."""
    question, chosen, rejected = (
        _read_text(record, key) for key in ("question", "chosen", "rejected")
    )
    if chosen == rejected:
        raise RecordError("'chosen' and 'rejected' are the same; there is nothing to prefer")
    asked = [("user", MessageContent(question))]
    said, images, videos = _assign_media(
        asked, _read_paths(record, "image"), _read_paths(record, "video")
    )
    return ParsedRecord(said, images, videos, _read_clip(record), answers=(chosen, rejected))


def _read_text(record: dict[str, Any], key: str) -> str:
    text = record.get(key)
    if not isinstance(text, str) or not text.strip():
        given = describe_json(text) if key in record else "missing"
        raise RecordError(f"{key!r} is {given}; wanted a text")
    return text


def _assign_media(
    messages: Sequence[tuple[str, MessageContent]], images: MediaPaths, videos: MediaPaths
) -> tuple[tuple[ParsedMessage, ...], MediaPaths, MediaPaths]:
    """Say which turn shows which pictures: those of its parts, or as many as it has marks."""
    counts, names = {}, {}
    for what, mark, listed in (
        ("image", IMAGE_PLACEHOLDER, images),
        ("video", VIDEO_PLACEHOLDER, videos),
    ):
        parts = [getattr(content, f"{what}s") for _, content in messages]
        texts = [content.text if role == "user" else "" for role, content in messages]
        if any(parts):
            counts[what] = [len(part) for part in parts]
            names[what] = _paths_from_parts([name for part in parts for name in part], listed, what)
        else:
            counts[what] = _counts_from_marks([text.count(mark) for text in texts], listed, what)
            names[what] = listed
    said = [
        ParsedMessage("user" if role == "user" else "assistant", content.text, *shown)
        for (role, content), *shown in zip(messages, counts["image"], counts["video"], strict=True)
    ]
    return tuple(said), names["image"], names["video"]


def _paths_from_parts(named: Sequence[str | None], listed: MediaPaths, what: str) -> MediaPaths:
    """Give the names that parts bring along, or those of the row's list to parts without."""
    own = tuple(name for name in named if name is not None)
    if own and (listed or len(own) < len(named)):
        raise RecordError(
            f"some {what}s are named in the content parts, some are not; name all there"
        )
    if not own and len(listed) != len(named):
        raise RecordError(
            f"{_pluralize(len(named), f'{what} part')} but {_pluralize(len(listed), what)}; "
            "name one for each"
        )
    return own or listed


def _counts_from_marks(marks: list[int], listed: MediaPaths, what: str) -> list[int]:
    """Give each turn as many as it has marks; without any mark the first turn shows all."""
    if not sum(marks):
        return [len(listed), *[0] * (len(marks) - 1)]
    if sum(marks) != len(listed):
        raise RecordError(
            f"{_pluralize(sum(marks), f'<{what}> mark')} but {_pluralize(len(listed), what)}; "
            f"write one mark for each, or none to put them before the question"
        )
    return marks


def _pluralize(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def _read_paths(record: dict[str, Any], key: str) -> MediaPaths:
    """Take the pictures of ``image`` or ``images``: a name, a list, or nothing at all."""
    given = {
        name: record[name] for name in (key, f"{key}s") if record.get(name) not in (None, "", [])
    }
    if len(given) > 1:
        raise RecordError(f"both '{key}' and '{key}s'; put all of them into one list")
    for name, value in given.items():
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
            wrong = value
            if isinstance(value, list):
                wrong = next(n for n in value if not isinstance(n, str) or not n)
            raise RecordError(f"{name!r} holds {describe_json(wrong)}; wanted paths of files")
        return tuple(names)
    return ()


def _read_clip(record: dict[str, Any]) -> tuple[float, float] | None:
    clip = record.get("clip")
    if clip is None:
        return None
    if not isinstance(clip, list) or [type(n) in (int, float) for n in clip] != [True, True]:
        raise RecordError(f"'clip' is {clip!r}; wanted [start, end] in seconds")
    if not 0 <= clip[0] < clip[1]:
        raise RecordError(f"'clip' goes from {clip[0]} to {clip[1]}; wanted a start before its end")
    return float(clip[0]), float(clip[1])


# what a form is called -> keys that only it has, and its reader
FORMATS: dict[str, tuple[MediaPaths, Callable[[dict[str, Any]], ParsedRecord]]] = {
    "'messages'": (("messages",), _parse_conversation),
    "'conversations'": (("conversations",), _parse_conversation),
    "'chosen' with 'rejected'": (("chosen", "rejected"), _parse_preference),
}


MEDIA_MARKS = {"image": IMAGE_PLACEHOLDER, "video": VIDEO_PLACEHOLDER}
# type of a part -> what it is; its name may stand under any key of NAMED, or be left to the row
PART_TYPES = {
    "text": "text",
    "input_text": "text",
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "video": "video",
    "video_url": "video",
}
PATH_KEYS = ("path", "url", "image", "image_url", "video", "video_url")
ContentPart = tuple[str, str | None]


class RecordError(Exception):
    """What is wrong with a row, in a user's words."""


def parse_content(content: Any, number: int) -> MessageContent:
    """Read the content of turn ``number``.

    Pictures before all text are left to the chat template, which numbers several of them; others
    are marked in the text, each on a line of its own.
    """
    if isinstance(content, str):
        return MessageContent(content)
    if not isinstance(content, list):
        raise RecordError(
            f"the content of turn {number} is {describe_json(content)}; wanted text or parts"
        )
    parts = [_parse_part(part, number) for part in content]
    shown = [what != "text" for what, _ in parts]
    if any(shown) and any(what == "text" and _has_media_mark(value) for what, value in parts):
        raise RecordError(
            f"turn {number} has {IMAGE_PLACEHOLDER} marks and picture parts; keep one of them"
        )
    in_front = shown == sorted(shown, reverse=True)
    texts = [value or "" for what, value in parts if what == "text"]
    text = "".join(texts) if in_front else _join_with_marks(parts)
    images, videos = (tuple(name for what, name in parts if what == mark) for mark in MEDIA_MARKS)
    return MessageContent(text, images, videos)


def describe_json(value: Any) -> str:
    """Say what a JSON value is."""
    names = {list: "a list", dict: "an object", bool: "true or false", type(None): "null"}
    names[str] = "a text" if value else "an empty text"
    return names.get(type(value), repr(value))


def _parse_part(part: Any, number: int) -> ContentPart:
    """Read one part: what it is, and its text or the name of its picture."""
    what = PART_TYPES.get(str(part.get("type"))) if isinstance(part, dict) else None
    if what is None:
        given = f"of type {part.get('type')!r}" if isinstance(part, dict) else describe_json(part)
        raise RecordError(f"a part of turn {number} is {given}; wanted {', '.join(PART_TYPES)}")
    if what == "text":
        if not isinstance(part.get("text"), str):
            raise RecordError(f"a text part of turn {number} has no text; wanted it under 'text'")
        return what, part["text"]
    name = next((part[key] for key in PATH_KEYS if part.get(key)), None)
    if isinstance(name, dict):  # OpenAI wraps addresses once more
        name = name.get("url")
    if name is not None and not isinstance(name, str):
        raise RecordError(
            f"a part of turn {number} names a picture by {describe_json(name)}; wanted its path"
        )
    return what, name


def _has_media_mark(text: str | None) -> bool:
    return any(mark in (text or "") for mark in MEDIA_MARKS.values())


def _join_with_marks(parts: Sequence[ContentPart]) -> str:
    texts = [value or "" if what == "text" else f"{MEDIA_MARKS[what]}\n" for what, value in parts]
    whole = "".join(texts)
    return whole if parts[-1][0] == "text" else whole.removesuffix("\n")
