"""Parse one training record, in any of the formats of ``formats.FORMATS``.

    {"messages": [{"role", "content"}], "images": [...]}        OpenAI, TRL
    {"conversations": [{"from", "value"}], "image": ...}        LLaVA, InternVL
    {"question", "chosen", "rejected", "image": ...}            preference pairs, as in MMPR
    {"prompt", "completion", "label"}                           unpaired preferences, as in TRL

``image``, ``images``, ``video`` and ``videos`` each take one file or a list of files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from internvl3_mlx.records.json_values import RecordError, describe_json, pluralize
from internvl3_mlx.records.media_refs import MediaRef, MediaRefs
from internvl3_mlx.training.data.content import (
    MEDIA_MARKS,
    MessageContent,
    check_unread_media,
    parse_content,
    parse_message_content,
    read_media,
)
from internvl3_mlx.training.data.conversations import read_conversation
from internvl3_mlx.training.data.formats import (
    COMMON_KEYS,
    LOSS_KEYS,
    check_refused_keys,
    find_format,
    unused_keys,
)
from internvl3_mlx.training.data.grounding import (
    Objects,
    check_markup,
    fill_objects,
    parse_objects,
    text_notes,
)

__all__ = ["ParsedMessage", "ParsedRecord", "RecordError", "parse_content", "parse_record"]

Role = Literal["user", "assistant"]
ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "developer": "system",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
}
EXPECTED_ROLES = "system, user, human, assistant, gpt"
# keys of a message that change what it says: refused rather than ignored
REFUSED_MESSAGE_KEYS = {
    "tool_calls": "tool use is not supported",
    "function_call": "tool use is not supported",
    "reasoning_content": "write it into the content, inside <think> and </think>",
    "audio": "audio is not supported",
    "audios": "audio is not supported",
}


@dataclass(frozen=True)
class ParsedMessage:
    """One message, and how many of the record's images and videos it shows.

    in_loss: whether an answer is trained on.
    """

    role: Role
    text: str
    num_images: int = 0
    num_videos: int = 0
    in_loss: bool = True


@dataclass(frozen=True)
class ParsedRecord:
    """A conversation that ends with an answer; or, with ``answers``, a conversation that ends with
    a question and two answers to it, (chosen, rejected), or one with a label.

    label: whether the only answer is desirable. clip: the part of each video to use, (start, end)
    in seconds. system: None for the model's own
    system prompt. is_text: the only message is plain text, trained on without a chat template.
    objects: what the placeholders for boxes stand for. format: its name. unused: keys that nothing
    reads. notes: what was converted, and what a label says.
    """

    messages: tuple[ParsedMessage, ...]
    images: MediaRefs = ()
    videos: MediaRefs = ()
    clip: tuple[float, float] | None = None
    system: str | None = None
    answers: tuple[str, ...] | None = None
    label: bool | None = None
    is_text: bool = False
    objects: Objects | None = None
    format: str = field(default="", compare=False)
    unused: tuple[str, ...] = field(default=(), compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)


def parse_record(value: Any) -> ParsedRecord:
    """Parse the JSON value of one record; raises ``RecordError``."""
    if not isinstance(value, dict):
        raise RecordError(f"the record is {describe_json(value)}; expected a JSON object")
    form = find_format(value)
    check_refused_keys(value, form)
    conversation = read_conversation(value, form)
    if conversation.is_text:
        parsed = _parse_text(conversation.turns[0]["content"], value)
    elif conversation.is_pair:
        parsed = _parse_pair(conversation.turns, conversation.chosen, conversation.rejected, value)
    else:
        parsed = _parse_conversation(conversation.turns, value)
        if conversation.label is not None:
            *prompt, reply = parsed.messages
            parsed = replace(
                parsed, messages=tuple(prompt), answers=(reply.text,), label=conversation.label
            )
    texts = [message.text for message in parsed.messages] + [*(parsed.answers or ())]
    has_media = bool(parsed.images or parsed.videos)
    if has_media:
        check_texts(parsed)
    else:
        check_unread_media(value, {*form.fields, *COMMON_KEYS})
    objects = parse_objects(value.get("objects"), texts, len(parsed.images))
    notes = [objects.note] if objects and objects.note else []
    if not parsed.is_text:
        notes += text_notes(texts, has_media=has_media)
    if parsed.label is not None:
        notes.append(f"the answer is {'desirable' if parsed.label else 'undesirable'}")
    return replace(
        parsed,
        objects=objects,
        format=form.name,
        unused=unused_keys(value, form),
        notes=tuple(notes),
    )


def check_texts(record: ParsedRecord) -> None:
    """Raise ``RecordError`` for markup of other tools in the texts of a record with media."""
    for message in record.messages:
        check_markup(message.text, "text" if record.is_text else message.role)
    for answer in record.answers or ():
        check_markup(answer, "assistant")


def fill_boxes(record: ParsedRecord, sizes: Sequence[tuple[int, int]]) -> ParsedRecord:
    """Write the boxes of ``objects`` into the texts. sizes: (width, height) of the images."""
    assert record.objects is not None
    texts = [message.text for message in record.messages] + [*(record.answers or ())]
    filled = [*fill_objects(texts, record.objects, sizes)]
    messages = [
        replace(message, text=text)
        for message, text in zip(record.messages, filled[: len(record.messages)], strict=True)
    ]
    answers = tuple(filled[len(record.messages) :]) if record.answers else None
    return replace(record, messages=tuple(messages), answers=answers, objects=None)


def _parse_text(text: str, record: Mapping[str, Any]) -> ParsedRecord:
    """Parse plain text, in which <image> marks where images belong."""
    messages, images, videos = _assign_media([_Turn("user", MessageContent(text))], record)
    return ParsedRecord(messages, images, videos, _read_clip(record), is_text=True)


def _parse_conversation(turns: Sequence[Any], record: Mapping[str, Any]) -> ParsedRecord:
    """Parse messages that end with an answer; the key names of all formats work everywhere."""
    messages = [_parse_message(entry, number) for number, entry in enumerate(turns, start=1)]
    system = messages.pop(0).content.text if messages[0].role == "system" else None
    first = 1 + (system is not None)
    _check_roles([message.role for message in messages], first)
    parsed, images, videos = _assign_media(messages, record)
    _check_not_empty(parsed, first)
    if not any(message.in_loss for message in parsed if message.role == "assistant"):
        raise RecordError("no answer is trained on: all have loss or weight 0; drop the record")
    return ParsedRecord(parsed, images, videos, _read_clip(record), system)


def _parse_pair(
    turns: Sequence[Any], chosen: Any, rejected: Any, record: Mapping[str, Any]
) -> ParsedRecord:
    """Parse a prompt and two answers to it."""
    prompt = _parse_conversation([*turns, chosen], record)
    other = _parse_conversation([*turns, rejected], record)
    answers = (prompt.messages[-1].text, other.messages[-1].text)
    if answers[0] == answers[1]:
        raise RecordError("'chosen' and 'rejected' are the same; drop the record")
    return replace(prompt, messages=prompt.messages[:-1], answers=answers)


@dataclass(frozen=True)
class _Turn:
    role: Literal["system", "user", "assistant"]
    content: MessageContent
    in_loss: bool = True


def _parse_message(message: Any, number: int) -> _Turn:
    if not isinstance(message, dict):
        raise RecordError(
            f"message {number} is {describe_json(message)}; expected an object with role and "
            "content"
        )
    given = message.get("role", message.get("from"))
    role = ROLES.get(given.strip().lower()) if isinstance(given, str) else None
    if role is None:
        has = f"role {given!r}" if given else "no 'role' or 'from'"
        raise RecordError(f"message {number} has {has}; expected {EXPECTED_ROLES}")
    for key, advice in REFUSED_MESSAGE_KEYS.items():
        if message.get(key):
            raise RecordError(f"message {number} has {key!r}: {advice}")
    content = parse_message_content(message, number)
    if role != "user" and (content.images or content.videos):
        raise RecordError(
            f"message {number} ({role}) has an image or video; only user messages may"
        )
    return _Turn(role, content, _read_loss(message, role, number))


def _read_loss(message: Mapping[str, Any], role: str, number: int) -> bool:
    """Read whether an answer is trained on: ms-swift's ``loss``, OpenAI's ``weight``."""
    given = {key: message[key] for key in LOSS_KEYS if message.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1):  # true and false among them
            raise RecordError(
                f"message {number} has {key} {value!r}; expected 0 or 1: an answer is trained on, "
                "or not"
            )
        if value and role != "assistant":
            raise RecordError(
                f"message {number} ({role}) has {key} {value!r}; only answers are trained on"
            )
    if len({bool(value) for value in given.values()}) > 1:
        raise RecordError(f"message {number} has {' and '.join(given)} that contradict each other")
    return all(given.values())


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


def _assign_media(
    turns: Sequence[_Turn], record: Mapping[str, Any]
) -> tuple[tuple[ParsedMessage, ...], MediaRefs, MediaRefs]:
    """Count each message's media: those it names, or as many as its text has placeholders."""
    counts, files = {}, {}
    for what in MEDIA_MARKS:
        listed = read_media(record, what)
        parts = [getattr(turn.content, f"{what}s") for turn in turns]
        texts = [turn.content.text if turn.role == "user" else "" for turn in turns]
        if any(parts):
            counts[what] = [len(part) for part in parts]
            files[what] = _files_of_parts([file for part in parts for file in part], listed, what)
        else:
            counts[what] = _counts_from_marks(
                [text.count(MEDIA_MARKS[what]) for text in texts], listed, what
            )
            files[what] = listed
    parsed = [
        ParsedMessage(
            "user" if turn.role == "user" else "assistant",
            turn.content.text,
            num_images,
            num_videos,
            turn.in_loss,
        )
        for turn, num_images, num_videos in zip(
            turns, counts["image"], counts["video"], strict=True
        )
    ]
    return tuple(parsed), files["image"], files["video"]


def _files_of_parts(named: Sequence[MediaRef | None], listed: MediaRefs, what: str) -> MediaRefs:
    """Return the files in the content parts, or the record's list if the parts name none."""
    own = tuple(file for file in named if file is not None)
    if own and (listed or len(own) < len(named)):
        raise RecordError(
            f"only some {what}s have a path in the content parts; give all of them one"
        )
    if not own and len(listed) != len(named):
        raise RecordError(
            f"{pluralize(len(named), f'{what} part')} but {pluralize(len(listed), what)}; "
            "give one for each"
        )
    return own or listed


def _counts_from_marks(marks: list[int], listed: MediaRefs, what: str) -> list[int]:
    """Return the placeholders per message; without any, the first message shows everything."""
    if not sum(marks):
        return [len(listed), *[0] * (len(marks) - 1)]
    if sum(marks) != len(listed):
        raise RecordError(
            f"{pluralize(sum(marks), f'<{what}> placeholder')} but "
            f"{pluralize(len(listed), what)}; write one placeholder for each, or none to put them "
            "before the question"
        )
    return marks


def _read_clip(record: Mapping[str, Any]) -> tuple[float, float] | None:
    clip = record.get("clip")
    if clip is None:
        return None
    if not isinstance(clip, list) or [type(n) in (int, float) for n in clip] != [True, True]:
        raise RecordError(f"'clip' is {clip!r}; expected [start, end] in seconds")
    if not 0 <= clip[0] < clip[1]:
        raise RecordError(f"'clip' goes from {clip[0]} to {clip[1]}; expected start before end")
    return float(clip[0]), float(clip[1])
