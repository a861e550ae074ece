"""Find the fields of an item in a record, whatever its source calls them.

The names are those of VLMEvalKit's TSV files, of the data sets that lmms-eval reads, of InternVL's
own evaluation files, and of training records.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from internvl3_mlx.evaluation.items import LETTERS
from internvl3_mlx.records.json_values import RecordError, decode_structured, describe_json
from internvl3_mlx.records.media_refs import MediaRef, parse_media_ref

ID_KEYS = ("id", "index", "question_id", "questionId", "pid", "qid", "uid")
QUESTION_KEYS = ("question", "query", "sent", "prompt", "instruction")
ANSWER_KEYS = ("answers", "answer", "gt_answer", "label", "target", "response")
OPTION_KEYS = ("options", "choices", "candidates")
IMAGE_KEYS = ("decoded_image", "image", "images", "img", "img_filename")
IMAGE_PATH_KEYS = ("image_path", "file_name", "filename", "image_name")
NUMBERED_IMAGES = tuple(f"image_{number}" for number in range(1, 8))
VIDEO_KEYS = ("video", "videos", "video_path")
CATEGORY_KEYS = ("category", "task_type", "type", "subfield", "question_type")
KIND_KEYS = ("dataset", "question_type")
HINT_KEYS = ("hint", "context")
OPEN_KINDS = ("open", "free_form")
PLACEHOLDER = re.compile(r"^\s*<(?:image|video)>\s*|\s*<(?:image|video)>\s*$")
REFERENCE_LENGTH = 64  # a longer value of VLMEvalKit's image column is a picture itself


@dataclass(frozen=True)
class Conversation:
    """A question and an answer taken from a training record."""

    question: str
    answer: str


def first_value(record: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """Return the value of the first key that has one."""
    return next((record[key] for key in keys if record.get(key) not in (None, "", [])), None)


def text_value(record: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Return the first value as text, "" without one."""
    value = first_value(record, keys)
    return "" if value is None else str(value)


def read_conversation(record: Mapping[str, Any]) -> Conversation | None:
    """Read a training record of one question and one answer; None for a record of another form."""
    turns = record.get("messages") or record.get("conversations")
    if not isinstance(turns, list):
        return None
    spoken = [
        (str(turn.get("role", turn.get("from"))), turn.get("content", turn.get("value")))
        for turn in turns
        if isinstance(turn, Mapping)
    ]
    spoken = [(role, text) for role, text in spoken if role != "system"]
    if len(spoken) != 2:
        raise RecordError(
            f"a conversation of {len(spoken)} messages; eval asks one question: give question and "
            "answer, or one exchange"
        )
    (_, question), (_, answer) = spoken
    if not isinstance(question, str) or not isinstance(answer, str):
        raise RecordError("content parts in a conversation; give question, answer and image")
    return Conversation(PLACEHOLDER.sub("", question), answer)


def read_answers(value: Any) -> tuple[str, ...]:
    """Read one answer or several: text, a number, a list, or a list of objects with ``answer``.

    Text that holds a list of texts counts as the list; one of numbers is an answer itself.
    """
    decoded = decode_structured(value)
    if isinstance(decoded, list) and (isinstance(value, list) or all(_is_text(v) for v in decoded)):
        entries = [entry["answer"] if isinstance(entry, Mapping) else entry for entry in decoded]
        return tuple(_answer_text(entry) for entry in entries)
    return (_answer_text(value),)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, Mapping) and "answer" in value)


def _answer_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping | list) or value is None:
        raise RecordError(f"an answer is {describe_json(value)}; expected text")
    return str(value)


def read_options(record: Mapping[str, Any]) -> dict[str, str]:
    """Read options from columns A, B, …, or from a list or an object of them."""
    given = decode_structured(first_value(record, OPTION_KEYS))
    if isinstance(given, Mapping):
        return {str(key): str(text) for key, text in given.items()}
    if isinstance(given, list):
        return dict(zip(LETTERS, map(str, given), strict=False))
    found: dict[str, str] = {}
    for letter in LETTERS:
        if record.get(letter) in (None, ""):
            break
        found[letter] = str(record[letter])
    return found if len(found) > 1 else {}


def answer_letters(
    answers: Sequence[str], options: Mapping[str, str], *, by_index: bool
) -> tuple[str, ...]:
    """Turn answers to a multiple-choice question into letters.

    An answer is a letter, the text of an option, or, with ``by_index``, its number from 0.
    """
    letters = [*options]
    texts = {text.strip(): letter for letter, text in options.items()}
    found: list[str] = []
    for answer in answers:
        word = answer.strip()
        if by_index and word.isdecimal() and int(word) < len(letters):
            found.append(letters[int(word)])
        elif word.strip("().").upper() in options:
            found.append(word.strip("().").upper())
        elif word in texts:
            found.append(texts[word])
        else:
            raise RecordError(
                f"the answer {answer!r} is none of the options {', '.join(letters)}; give a letter "
                "or an option's text"
            )
    return tuple(found)


def read_media_list(value: Any) -> list[MediaRef]:
    """Read one picture or a list of them, also as the text of a list."""
    decoded = decode_structured(value)
    files = [
        parse_media_ref(entry) for entry in (decoded if isinstance(decoded, list) else [value])
    ]
    if None in files:
        raise RecordError(f"an image is {describe_json(value)}; expected a path or the file")
    return [file for file in files if file is not None]


def image_values(record: Mapping[str, Any]) -> list[Any]:
    """List what a record gives as images, unparsed: one column, or ``image_1`` and so on."""
    numbered = [record[key] for key in NUMBERED_IMAGES if record.get(key)]
    if numbered:
        return numbered
    value = first_value(record, IMAGE_KEYS)
    if value is None:
        value = first_value(record, IMAGE_PATH_KEYS)
    if value is None:
        return []
    decoded = decode_structured(value)
    return decoded if isinstance(decoded, list) else [value]


def is_reference(value: Any, indices: Mapping[str, int]) -> bool:
    """Tell whether an image is the index of another row that holds the picture."""
    return (
        isinstance(value, str | int)
        and len(str(value)) <= REFERENCE_LENGTH
        and (str(value) in indices)
    )
