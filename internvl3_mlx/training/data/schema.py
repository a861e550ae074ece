"""Parse one training record, in any of three formats.

    {"messages": [{"role", "content"}], "images": [...]}        OpenAI, TRL
    {"conversations": [{"from", "value"}], "image": ...}        LLaVA, InternVL
    {"question", "chosen", "rejected", "image": ...}            preference pairs, as in MMPR

``image``, ``images``, ``video`` and ``videos`` each take one path or a list of paths.
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


class RecordError(Exception):
    """What is wrong with a record, in words for the user; the location is added by the caller."""


@dataclass(frozen=True)
class ParsedMessage:
    """One message, and how many of the record's images and videos it shows."""

    role: Role
    text: str
    num_images: int = 0
    num_videos: int = 0


@dataclass(frozen=True)
class ParsedRecord:
    """A conversation that ends with an answer; or, with ``answers``, a conversation that ends with
    a question and two answers to it: (chosen, rejected).

    clip: the part of each video to use, (start, end) in seconds. system: None for the model's own
    system prompt.
    """

    messages: tuple[ParsedMessage, ...]
    images: MediaPaths = ()
    videos: MediaPaths = ()
    clip: tuple[float, float] | None = None
    system: str | None = None
    answers: tuple[str, str] | None = None


@dataclass(frozen=True)
class MessageContent:
    """The text of a message, and the media of its content parts.

    An entry is None where the part names no path and takes the next one of the record's list.
    """

    text: str
    images: tuple[str | None, ...] = ()
    videos: tuple[str | None, ...] = ()


def parse_record(value: Any) -> ParsedRecord:
    """Parse the JSON value of one record; raises ``RecordError``."""
    if not isinstance(value, dict):
        raise RecordError(f"the record is {describe_json(value)}; expected a JSON object")
    formats = [name for name, (keys, _) in FORMATS.items() if any(key in value for key in keys)]
    if not formats:
        given = f"only {', '.join(map(repr, value))}" if value else "no keys"
        raise RecordError(
            f"the record has {given}; expected 'messages', 'conversations', or 'question' with "
            "'chosen' and 'rejected'"
        )
    if len(formats) > 1:
        raise RecordError(f"both {formats[0]} and {formats[1]}; use one format per record")
    return FORMATS[formats[0]][1](value)


def _parse_conversation(record: dict[str, Any]) -> ParsedRecord:
    """Parse ``messages`` or ``conversations``; the key names of either work in both."""
    key = "messages" if "messages" in record else "conversations"
    entries = record[key]
    if not isinstance(entries, list) or not entries:
        given = "empty" if entries == [] else describe_json(entries)
        raise RecordError(f"{key!r} is {given}; expected a list of messages")
    messages = [_parse_message(entry, number) for number, entry in enumerate(entries, start=1)]
    system = messages.pop(0)[1].text if messages[0][0] == "system" else None
    first = 1 + (system is not None)
    _check_roles([role for role, _ in messages], first)
    parsed, images, videos = _assign_media(
        messages, _read_paths(record, "image"), _read_paths(record, "video")
    )
    _check_not_empty(parsed, first)
    return ParsedRecord(parsed, images, videos, _read_clip(record), system)


def _parse_message(
    message: Any, number: int
) -> tuple[Literal["system", "user", "assistant"], MessageContent]:
    if not isinstance(message, dict):
        raise RecordError(
            f"message {number} is {describe_json(message)}; expected an object with role and "
            "content"
        )
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise RecordError(f"message {number} has role {role!r}; expected {', '.join(ROLES)}")
    content = parse_content(message.get("content", message.get("value")), number)
    if ROLES[role] != "user" and (content.images or content.videos):
        raise RecordError(
            f"message {number} ({ROLES[role]}) has an image or video; only user messages may"
        )
    return ROLES[role], content


def _check_roles(roles: Sequence[str], first: int) -> None:
    """Check that user and assistant alternate and that the assistant has the last word."""
    for number, role in enumerate(roles):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            raise RecordError(
                f"message {first + number} is from the {role}; expected the {expected}: user and "
                "assistant alternate, after an optional system message"
            )
    if not roles or len(roles) % 2:
        raise RecordError("the last message is not an answer; end with an assistant message")


def _check_not_empty(messages: Sequence[ParsedMessage], first: int) -> None:
    for number, message in enumerate(messages, start=first):
        if not message.text.strip() and not (message.num_images or message.num_videos):
            what = "question" if message.role == "user" else "answer"
            raise RecordError(f"message {number} is an empty {what}; fill it in or drop the record")


def _parse_preference(record: dict[str, Any]) -> ParsedRecord:
    """Parse ``question``, ``chosen`` and ``rejected``."""
    question, chosen, rejected = (
        _read_text(record, key) for key in ("question", "chosen", "rejected")
    )
    if chosen == rejected:
        raise RecordError("'chosen' and 'rejected' are the same; drop the record")
    messages, images, videos = _assign_media(
        [("user", MessageContent(question))],
        _read_paths(record, "image"),
        _read_paths(record, "video"),
    )
    return ParsedRecord(messages, images, videos, _read_clip(record), answers=(chosen, rejected))


def _read_text(record: dict[str, Any], key: str) -> str:
    text = record.get(key)
    if not isinstance(text, str) or not text.strip():
        given = describe_json(text) if key in record else "missing"
        raise RecordError(f"{key!r} is {given}; expected text")
    return text


def _assign_media(
    messages: Sequence[tuple[str, MessageContent]], images: MediaPaths, videos: MediaPaths
) -> tuple[tuple[ParsedMessage, ...], MediaPaths, MediaPaths]:
    """Count each message's media: its content parts, or as many as its text has placeholders."""
    counts, paths = {}, {}
    for what, listed in (("image", images), ("video", videos)):
        parts = [getattr(content, f"{what}s") for _, content in messages]
        texts = [content.text if role == "user" else "" for role, content in messages]
        if any(parts):
            counts[what] = [len(part) for part in parts]
            paths[what] = _paths_from_parts([path for part in parts for path in part], listed, what)
        else:
            counts[what] = _counts_from_marks(
                [text.count(MEDIA_MARKS[what]) for text in texts], listed, what
            )
            paths[what] = listed
    parsed = [
        ParsedMessage("user" if role == "user" else "assistant", content.text, *media)
        for (role, content), *media in zip(messages, counts["image"], counts["video"], strict=True)
    ]
    return tuple(parsed), paths["image"], paths["video"]


def _paths_from_parts(named: Sequence[str | None], listed: MediaPaths, what: str) -> MediaPaths:
    """Return the paths in the content parts, or the record's list if the parts name none."""
    own = tuple(path for path in named if path is not None)
    if own and (listed or len(own) < len(named)):
        raise RecordError(
            f"only some {what}s have a path in the content parts; give all of them one"
        )
    if not own and len(listed) != len(named):
        raise RecordError(
            f"{_pluralize(len(named), f'{what} part')} but {_pluralize(len(listed), what)}; "
            "give one for each"
        )
    return own or listed


def _counts_from_marks(marks: list[int], listed: MediaPaths, what: str) -> list[int]:
    """Return the placeholders per message; without any, the first message shows everything."""
    if not sum(marks):
        return [len(listed), *[0] * (len(marks) - 1)]
    if sum(marks) != len(listed):
        raise RecordError(
            f"{_pluralize(sum(marks), f'<{what}> placeholder')} but "
            f"{_pluralize(len(listed), what)}; write one placeholder for each, or none to put them "
            "before the question"
        )
    return marks


def _pluralize(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def _read_paths(record: dict[str, Any], key: str) -> MediaPaths:
    """Read ``image`` or ``images`` (or the video keys): a path, a list of paths, or nothing."""
    given = {
        name: record[name] for name in (key, f"{key}s") if record.get(name) not in (None, "", [])
    }
    if len(given) > 1:
        raise RecordError(f"both '{key}' and '{key}s'; put all paths into one list")
    for name, value in given.items():
        paths = [value] if isinstance(value, str) else value
        if not isinstance(paths, list) or not all(isinstance(p, str) and p for p in paths):
            wrong = value
            if isinstance(value, list):
                wrong = next(p for p in value if not isinstance(p, str) or not p)
            raise RecordError(f"{name!r} contains {describe_json(wrong)}; expected file paths")
        return tuple(paths)
    return ()


def _read_clip(record: dict[str, Any]) -> tuple[float, float] | None:
    clip = record.get("clip")
    if clip is None:
        return None
    if not isinstance(clip, list) or [type(n) in (int, float) for n in clip] != [True, True]:
        raise RecordError(f"'clip' is {clip!r}; expected [start, end] in seconds")
    if not 0 <= clip[0] < clip[1]:
        raise RecordError(f"'clip' goes from {clip[0]} to {clip[1]}; expected start before end")
    return float(clip[0]), float(clip[1])


# name of a format -> the keys that only it has, and its parser
FORMATS: dict[str, tuple[MediaPaths, Callable[[dict[str, Any]], ParsedRecord]]] = {
    "'messages'": (("messages",), _parse_conversation),
    "'conversations'": (("conversations",), _parse_conversation),
    "'chosen' with 'rejected'": (("chosen", "rejected"), _parse_preference),
}


MEDIA_MARKS = {"image": IMAGE_PLACEHOLDER, "video": VIDEO_PLACEHOLDER}
# type of a content part -> what it is; its path is under any key of PATH_KEYS, or in the record
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
ContentPart = tuple[str, str | None]  # "text", "image" or "video"; its text or its path


def parse_content(content: Any, number: int) -> MessageContent:
    """Parse the content of message ``number``: text, or a list of content parts.

    Media before all text are left to the chat template, which numbers several of them. Other media
    become placeholders in the text, each on a line of its own.
    """
    if isinstance(content, str):
        return MessageContent(content)
    if not isinstance(content, list):
        raise RecordError(
            f"the content of message {number} is {describe_json(content)}; expected text or a list "
            "of parts"
        )
    parts = [_parse_part(part, number) for part in content]
    is_media = [what != "text" for what, _ in parts]
    if any(is_media) and any(what == "text" and _has_media_mark(value) for what, value in parts):
        raise RecordError(
            f"message {number} has both {IMAGE_PLACEHOLDER} placeholders and image parts; use "
            "one of them"
        )
    media_first = is_media == sorted(is_media, reverse=True)
    texts = [value or "" for what, value in parts if what == "text"]
    text = "".join(texts) if media_first else _join_with_marks(parts)
    images, videos = (tuple(path for what, path in parts if what == kind) for kind in MEDIA_MARKS)
    return MessageContent(text, images, videos)


def describe_json(value: Any) -> str:
    """Describe the type of a JSON value in words."""
    names = {list: "a list", dict: "an object", bool: "true or false", type(None): "null"}
    names[str] = "text" if value else "empty text"
    return names.get(type(value), repr(value))


def _parse_part(part: Any, number: int) -> ContentPart:
    """Parse one content part: what it is, and its text or its path."""
    what = PART_TYPES.get(str(part.get("type"))) if isinstance(part, dict) else None
    if what is None:
        is_object = isinstance(part, dict)
        given = f"has type {part.get('type')!r}" if is_object else f"is {describe_json(part)}"
        raise RecordError(
            f"a content part of message {number} {given}; expected {', '.join(PART_TYPES)}"
        )
    if what == "text":
        if not isinstance(part.get("text"), str):
            raise RecordError(f"a text part of message {number} has no text; put it under 'text'")
        return what, part["text"]
    path = next((part[key] for key in PATH_KEYS if part.get(key)), None)
    if isinstance(path, dict):  # OpenAI nests the URL: {"image_url": {"url": ...}}
        path = path.get("url")
    if path is not None and not isinstance(path, str):
        raise RecordError(
            f"a content part of message {number} has {describe_json(path)} for its path; expected "
            "text"
        )
    return what, path


def _has_media_mark(text: str | None) -> bool:
    return any(mark in (text or "") for mark in MEDIA_MARKS.values())


def _join_with_marks(parts: Sequence[ContentPart]) -> str:
    texts = [value or "" if what == "text" else f"{MEDIA_MARKS[what]}\n" for what, value in parts]
    joined = "".join(texts)
    return joined if parts[-1][0] == "text" else joined.removesuffix("\n")
