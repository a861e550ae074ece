"""The user's own questions with known answers, from a file of any form that training reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl3_mlx.errors import DataError
from internvl3_mlx.records.json_values import RecordError, decode_structured, describe_json
from internvl3_mlx.records.media_refs import parse_media_ref
from internvl3_mlx.records.open_records import open_records

ANSWER_KEYS = ("answer", "answers", "answer_gt", "label")
QUESTION_KEYS = ("question", "prompt", "query")
IMAGE_KEYS = ("image", "images")


@dataclass(frozen=True)
class KnownQuestion:
    """A question, its images as paths or URLs, and its known answers. location: file and line."""

    number: int
    question: str
    images: tuple[str, ...]
    answers: tuple[str, ...]
    location: str


def read_questions(path: Path, limit: int | None = None) -> list[KnownQuestion]:
    """Read the questions of a file; paths of images are relative to its folder.

    Raises ``DataError`` for the first record that is not a question with an answer.
    """
    source = open_records([path])
    count = len(source) if limit is None else min(limit, len(source))
    return [read_question(source, index, path) for index in range(count)]


def read_question(source: Any, index: int, path: Path) -> KnownQuestion:
    location = f"{path.name}:{source.number(index)}"
    try:
        record = source[index]
        if not isinstance(record, Mapping):
            raise RecordError(f"the record is {describe_json(record)}; expected an object")
        question = read_text(record, QUESTION_KEYS)
        answers = read_answers(record)
        images = tuple(image_path(entry, path.parent) for entry in read_images(record))
    except (ValueError, RecordError) as error:
        raise DataError(f"{location}: {error}") from error
    return KnownQuestion(index, question, images, answers, location)


def read_text(record: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    found = next((record[key] for key in keys if record.get(key) not in (None, "")), None)
    if not isinstance(found, str) or not found.strip():
        raise RecordError(f"no {keys[0]!r}; expected text under {', '.join(map(repr, keys))}")
    return found


def read_answers(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Return one or several answers; numbers are taken as text."""
    found = next(
        (record[key] for key in ANSWER_KEYS if record.get(key) not in (None, "", [])), None
    )
    listed = decode_structured(found)
    listed = listed if isinstance(listed, list) else [listed]
    texts = [
        str(entry)
        for entry in listed
        if isinstance(entry, str | int | float) and not isinstance(entry, bool)
    ]
    if not texts or len(texts) < len(listed) or not all(text.strip() for text in texts):
        raise RecordError(
            f"no 'answer'; expected text, a number or a list of them under "
            f"{', '.join(map(repr, ANSWER_KEYS))}"
        )
    return tuple(texts)


def read_images(record: Mapping[str, Any]) -> list[Any]:
    given = [record[key] for key in IMAGE_KEYS if record.get(key) not in (None, "", [])]
    if len(given) > 1:
        raise RecordError("both 'image' and 'images'; put all paths into one list")
    value = decode_structured(given[0]) if given else []
    return value if isinstance(value, list) else [value]


def image_path(value: Any, folder: Path) -> str:
    """Return an absolute path, or a URL as it is."""
    found = parse_media_ref(value)
    if not isinstance(found, str):
        raise RecordError(
            f"an image is {describe_json(value)}; the rows name images by their paths, so save it "
            "as a file"
        )
    if "://" in found or found.startswith("data:"):
        return found
    path = (folder / Path(found).expanduser()).absolute()
    if not path.is_file():
        raise RecordError(f"no image at {path}; check the path")
    return str(path)
