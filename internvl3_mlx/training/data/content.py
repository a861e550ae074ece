"""Parse the content of a message and the images and videos that a record names."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from internvl3_mlx.images.load import IMAGE_SUFFIXES
from internvl3_mlx.prompt.messages import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from internvl3_mlx.records.json_values import (
    RecordError,
    decode_structured,
    describe_json,
    pluralize,
)
from internvl3_mlx.records.media_refs import (
    BASE64_IMAGE,
    PATH_KEYS,
    MediaRef,
    MediaRefs,
    parse_media_ref,
)

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
FILE_NAME = "file_name"  # the key of an imagefolder of the datasets library
VIDEO_SUFFIXES = frozenset((".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi"))
MAX_PATH = 1000  # characters
ContentPart = tuple[str, MediaRef | None]  # "text", "image" or "video"; its text or its file


@dataclass(frozen=True)
class MessageContent:
    """The text of a message, and the media it names itself.

    An entry is None where a content part names no file and takes the next one of the record's list.
    """

    text: str
    images: tuple[MediaRef | None, ...] = ()
    videos: tuple[MediaRef | None, ...] = ()


def parse_message_content(message: Mapping[str, Any], number: int) -> MessageContent:
    """Parse the content of message ``number`` with the media that the message itself lists."""
    content = message.get("content", message.get("value"))
    parsed = parse_content(content, number)
    listed = {what: read_media(message, what) for what in MEDIA_MARKS}
    if not any(listed.values()):
        return parsed
    if parsed.images or parsed.videos:
        raise RecordError(
            f"message {number} has both content parts with media and a list of media; use one"
        )
    for what, files in listed.items():
        marks = parsed.text.count(MEDIA_MARKS[what])
        if marks and marks != len(files):
            raise RecordError(
                f"message {number} has {pluralize(marks, f'<{what}> placeholder')} but "
                f"{pluralize(len(files), what)}; write one for each, or none"
            )
    return MessageContent(parsed.text, listed["image"], listed["video"])


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
    texts = [str(value or "") for what, value in parts if what == "text"]
    text = "".join(texts) if media_first else _join_with_marks(parts)
    images, videos = (tuple(path for what, path in parts if what == kind) for kind in MEDIA_MARKS)
    return MessageContent(text, images, videos)


def _parse_part(part: Any, number: int) -> ContentPart:
    """Parse one content part: what it is, and its text or its file."""
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
    source = next((part[key] for key in PATH_KEYS if part.get(key)), None)
    if source is None:
        return what, None
    file = parse_media_ref(source)
    if file is None:
        raise RecordError(
            f"a content part of message {number} has {describe_json(source)} for its path; "
            "expected text"
        )
    return what, file


def _has_media_mark(text: MediaRef | None) -> bool:
    return any(mark in str(text or "") for mark in MEDIA_MARKS.values())


def _join_with_marks(parts: Sequence[ContentPart]) -> str:
    texts = [
        str(value or "") if what == "text" else f"{MEDIA_MARKS[what]}\n" for what, value in parts
    ]
    joined = "".join(texts)
    return joined if parts[-1][0] == "text" else joined.removesuffix("\n")


def read_media(record: Mapping[str, Any], key: str) -> MediaRefs:
    """Read ``image`` or ``images`` (or the video keys): one file, a list of files, or nothing."""
    given = {
        name: record[name] for name in (key, f"{key}s") if record.get(name) not in (None, "", [])
    }
    if len(given) > 1:
        raise RecordError(f"both '{key}' and '{key}s'; put all paths into one list")
    named = record.get(FILE_NAME)
    if not given and isinstance(named, str) and media_kind(named) == key:
        given = {FILE_NAME: named}
    for name, value in given.items():
        value = decode_structured(value)
        files = []
        for entry in value if isinstance(value, list) else [value]:
            file = parse_media_ref(entry)
            if file is None:
                keys = ", with 'path' or 'bytes'" if isinstance(entry, dict) else ""
                raise RecordError(
                    f"{name!r} contains {describe_json(entry)}; expected file paths{keys}"
                )
            files.append(file)
        return tuple(files)
    return ()


def media_kind(value: Any) -> str | None:
    """Return "image" or "video" for a value that names one, whatever its key; else None."""
    if isinstance(value, list):
        kinds = {media_kind(entry) for entry in value}
        return kinds.pop() if len(kinds) == 1 else None
    if isinstance(value, dict):
        found = value.get("bytes") or next((value[key] for key in PATH_KEYS if value.get(key)), "")
        return media_kind(found)
    if isinstance(value, bytes):
        return "image"
    if not isinstance(value, str):
        return None
    if value.startswith("data:image/") or BASE64_IMAGE.fullmatch(value):
        return "image"
    if len(value) > MAX_PATH or "\n" in value:
        return None
    suffix = f".{value.rpartition('.')[2].lower()}"
    suffixes_of = {"image": IMAGE_SUFFIXES, "video": VIDEO_SUFFIXES}
    return next((kind for kind, suffixes in suffixes_of.items() if suffix in suffixes), None)


def check_unread_media(record: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise ``RecordError`` for a record without media that names some under an unknown key."""
    for key, value in record.items():
        if key not in known and key != "id" and (kind := media_kind(value)):
            name = f"{kind}s" if isinstance(value, list) else kind
            raise RecordError(
                f"the record has no images, but {key!r} names {kind}s, which nothing reads; "
                f"rename the key to {name!r}, or drop it"
            )
