"""One row of training data, in any of the three forms, read into what was said and shown.

    {"messages": [{"role", "content"}], "images": [...]}        OpenAI's, TRL's
    {"conversations": [{"from", "value"}], "image": ...}        LLaVA's, InternVL's
    {"question", "chosen", "rejected", "image": ...}            MMPR's pairs of answers

``image``, ``images``, ``video`` and ``videos`` each take one name or a list of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from internvl3_mlx.prompt.messages import IMAGE_MARK, VIDEO_MARK

Role = Literal["user", "assistant"]
ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
Names = tuple[str, ...]


@dataclass(frozen=True)
class Said:
    """One turn, and how many of the row's pictures and videos it shows."""

    role: Role
    text: str
    images: int = 0
    videos: int = 0


@dataclass(frozen=True)
class Row:
    """A conversation that ends with an answer; or, with ``answers``, one that ends with a question
    and the two answers to it: the chosen and the rejected one.

    bound: the part of the videos that is watched, in seconds. system: None for the model's own.
    """

    turns: tuple[Said, ...]
    images: Names = ()
    videos: Names = ()
    bound: tuple[float, float] | None = None
    system: str | None = None
    answers: tuple[str, str] | None = None


def read_row(value: Any) -> Row:
    """Read one row; raise ``RowFault`` with what is wrong and what was wanted."""
    if not isinstance(value, dict):
        raise RowFault(f"{kind(value)}; wanted an object in braces")
    found = [name for name, (keys, _) in FORMS.items() if any(key in value for key in keys)]
    if not found:
        given = ", ".join(map(repr, value)) or "no keys at all"
        raise RowFault(
            f"{given}; wanted 'messages', 'conversations', or 'question' with 'chosen' "
            "and 'rejected'"
        )
    if len(found) > 1:
        raise RowFault(f"both {found[0]} and {found[1]}; a row has one form, remove the other")
    return FORMS[found[0]][1](value)


def _conversation(row: dict[str, Any]) -> Row:
    """Read ``messages`` or ``conversations``; either may name its keys as the other does."""
    key = "messages" if "messages" in row else "conversations"
    entries = row[key]
    if not isinstance(entries, list) or not entries:
        given = "empty" if entries == [] else kind(entries)
        raise RowFault(f"{key!r} is {given}; wanted a list of turns")
    turns = [_turn(entry, number) for number, entry in enumerate(entries, start=1)]
    system = turns.pop(0)[1].text if turns[0][0] == "system" else None
    roles = [role for role, _ in turns]
    first = 1 + (system is not None)
    for number, role in enumerate(roles):
        wanted = ("user", "assistant")[number % 2]
        if role != wanted:
            raise RowFault(
                f"turn {first + number} is the {role}'s; wanted the {wanted}'s: "
                "user and assistant take turns, a system text comes first"
            )
    if not roles or len(roles) % 2:
        raise RowFault("no answer at the end; wanted an assistant's turn, which is what is learned")
    said, images, videos = _shown(turns, _names(row, "image"), _names(row, "video"))
    _check_words(said, first)
    return Row(said, images, videos, _bound(row), system)


@dataclass(frozen=True)
class Content:
    """The text of a turn, and the pictures its parts show; None where the row's list names one."""

    text: str
    images: tuple[str | None, ...] = ()
    videos: tuple[str | None, ...] = ()


def _turn(entry: Any, number: int) -> tuple[Literal["system", "user", "assistant"], Content]:
    if not isinstance(entry, dict):
        raise RowFault(f"turn {number} is {kind(entry)}; wanted an object with role and content")
    role = entry.get("role", entry.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise RowFault(f"turn {number} has role {role!r}; wanted {', '.join(ROLES)}")
    content = read_content(entry.get("content", entry.get("value")), number)
    if ROLES[role] != "user" and (content.images or content.videos):
        raise RowFault(f"turn {number}, the {ROLES[role]}'s, shows a picture; only users' do")
    return ROLES[role], content


def _check_words(said: Sequence[Said], first: int) -> None:
    for number, turn in enumerate(said, start=first):
        if not turn.text.strip() and not (turn.images or turn.videos):
            what = "question" if turn.role == "user" else "answer"
            raise RowFault(f"turn {number} is an empty {what}; write it or remove the row")


def _preference(row: dict[str, Any]) -> Row:
    """Read MMPR's ``question``, ``chosen`` and ``rejected``."""
    question, chosen, rejected = (_text(row, key) for key in ("question", "chosen", "rejected"))
    if chosen == rejected:
        raise RowFault("'chosen' and 'rejected' are the same; there is nothing to prefer")
    asked = [("user", Content(question))]
    said, images, videos = _shown(asked, _names(row, "image"), _names(row, "video"))
    return Row(said, images, videos, _bound(row), answers=(chosen, rejected))


def _text(row: dict[str, Any], key: str) -> str:
    text = row.get(key)
    if not isinstance(text, str) or not text.strip():
        given = kind(text) if key in row else "missing"
        raise RowFault(f"{key!r} is {given}; wanted a text")
    return text


def _shown(
    turns: Sequence[tuple[str, Content]], images: Names, videos: Names
) -> tuple[tuple[Said, ...], Names, Names]:
    """Say which turn shows which pictures: those of its parts, or as many as it has marks."""
    counts, names = {}, {}
    for what, mark, listed in (("image", IMAGE_MARK, images), ("video", VIDEO_MARK, videos)):
        parts = [getattr(content, f"{what}s") for _, content in turns]
        texts = [content.text if role == "user" else "" for role, content in turns]
        if any(parts):
            counts[what] = [len(part) for part in parts]
            names[what] = _of_parts([name for part in parts for name in part], listed, what)
        else:
            counts[what] = _by_marks([text.count(mark) for text in texts], listed, what)
            names[what] = listed
    said = [
        Said("user" if role == "user" else "assistant", content.text, *shown)
        for (role, content), *shown in zip(turns, counts["image"], counts["video"], strict=True)
    ]
    return tuple(said), names["image"], names["video"]


def _of_parts(named: Sequence[str | None], listed: Names, what: str) -> Names:
    """Give the names that parts bring along, or those of the row's list to parts without."""
    own = tuple(name for name in named if name is not None)
    if own and (listed or len(own) < len(named)):
        raise RowFault(f"some {what}s are named in the content parts, some are not; name all there")
    if not own and len(listed) != len(named):
        raise RowFault(
            f"{_count(len(named), f'{what} part')} but {_count(len(listed), what)}; "
            "name one for each"
        )
    return own or listed


def _by_marks(marks: list[int], listed: Names, what: str) -> list[int]:
    """Give each turn as many as it has marks; without any mark the first turn shows all."""
    if not sum(marks):
        return [len(listed), *[0] * (len(marks) - 1)]
    if sum(marks) != len(listed):
        raise RowFault(
            f"{_count(sum(marks), f'<{what}> mark')} but {_count(len(listed), what)}; "
            f"write one mark for each, or none to put them before the question"
        )
    return marks


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def _names(row: dict[str, Any], key: str) -> Names:
    """Take the pictures of ``image`` or ``images``: a name, a list, or nothing at all."""
    given = {name: row[name] for name in (key, f"{key}s") if row.get(name) not in (None, "", [])}
    if len(given) > 1:
        raise RowFault(f"both '{key}' and '{key}s'; put all of them into one list")
    for name, value in given.items():
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
            wrong = value
            if isinstance(value, list):
                wrong = next(n for n in value if not isinstance(n, str) or not n)
            raise RowFault(f"{name!r} holds {kind(wrong)}; wanted paths of files")
        return tuple(names)
    return ()


def _bound(row: dict[str, Any]) -> tuple[float, float] | None:
    clip = row.get("clip")
    if clip is None:
        return None
    if not isinstance(clip, list) or [type(n) in (int, float) for n in clip] != [True, True]:
        raise RowFault(f"'clip' is {clip!r}; wanted [start, end] in seconds")
    if not 0 <= clip[0] < clip[1]:
        raise RowFault(f"'clip' goes from {clip[0]} to {clip[1]}; wanted a start before its end")
    return float(clip[0]), float(clip[1])


# what a form is called -> keys that only it has, and its reader
FORMS: dict[str, tuple[Names, Callable[[dict[str, Any]], Row]]] = {
    "'messages'": (("messages",), _conversation),
    "'conversations'": (("conversations",), _conversation),
    "'chosen' with 'rejected'": (("chosen", "rejected"), _preference),
}


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
