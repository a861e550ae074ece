"""Messages, the segments of a prompt, and the places of a message's images in its text."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from internvl3_mlx.errors import PromptError

IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"


@dataclass(frozen=True)
class MessageMedia:
    """One image or video of a message.

    tiles: the number of tiles, one entry for an image (several are added up), one per frame for a
    video. times: seconds, one per frame, if the prompt names them.
    """

    tiles: tuple[int, ...]
    kind: Literal["image", "video"] = "image"
    times: tuple[float, ...] | None = None

    @property
    def num_images(self) -> int:
        """How many runs of image tokens it becomes: one, or one for each frame."""
        return len(self.tiles) if self.kind == "video" else 1

    def __post_init__(self) -> None:
        if not self.tiles or min(self.tiles) < 1:
            raise PromptError(
                f"{self.kind} with tiles {self.tiles}: every image and frame needs at least one"
            )
        if self.times is not None and (self.kind != "video" or len(self.times) != len(self.tiles)):
            raise PromptError(
                f"{len(self.times)} frame times for {self.kind} with {len(self.tiles)} entries: "
                "give a video one time per frame"
            )


@dataclass(frozen=True)
class Message:
    """One message. Only the user's have images.

    token_ids: the generated ids of an answer. Its text may tokenize to others; with them a prompt
    repeats the answer exactly. extra_placeholders: of more placeholders than images the first ones
    place the images, as in the published ``chat()``, and the others stay text.
    texts: where the media stand, whatever ``text`` says: the texts before, between and after them,
    one more than there are media.
    """

    role: Literal["user", "assistant"]
    text: str
    media: tuple[MessageMedia, ...] = ()
    token_ids: tuple[int, ...] = ()
    extra_placeholders: bool = False
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.texts and len(self.texts) != len(self.media) + 1:
            raise PromptError(
                f"{len(self.texts)} texts around {len(self.media)} images or videos; "
                "give one more than there are media"
            )
        if self.role not in ("user", "assistant"):
            raise PromptError(
                f"message with role {self.role!r}; use 'user' or 'assistant', "
                "and pass the system prompt as system"
            )
        if self.media and self.role != "user":
            raise PromptError("images in an assistant message; move them to the user's message")
        if self.token_ids and self.role != "assistant":
            raise PromptError("token ids in a user's message; only generated answers have them")


@dataclass(frozen=True)
class TextSegment:
    """Text of a prompt. In ``untrusted`` text, structural special tokens stay plain text."""

    text: str
    untrusted: bool = False


@dataclass(frozen=True)
class ImageSegment:
    """One image or frame: <img>, its context tokens, </img>."""

    tiles: int


@dataclass(frozen=True)
class GeneratedAnswer:
    """An answer as it was generated, as token ids."""

    token_ids: tuple[int, ...]


Segment = TextSegment | ImageSegment | GeneratedAnswer


def check_messages(turns: Sequence[Message]) -> None:
    """Raise ``PromptError`` unless the conversation ends with the user."""
    if not turns or turns[-1].role != "user":
        given = f"ends with {turns[-1].role!r}" if turns else "is empty"
        raise PromptError(f"the conversation {given}; its last message must be the user's")


def message_segments(turn: Message) -> list[Segment]:
    """Return the segments of one message in the format the model was trained on.

    Placeholders in the text place the images when there are as many as images. Otherwise the images
    come first, then the frames of videos, and placeholders stay plain text.
    """
    if turn.token_ids:
        return [GeneratedAnswer(turn.token_ids)]
    if turn.texts:
        return merge_segments(_placed_media(turn))
    images = [medium for medium in turn.media if medium.kind == "image"]
    videos = [medium for medium in turn.media if medium.kind == "video"]
    front: list[Segment] = []
    placed: dict[str, Iterator[list[Segment]]] = {}
    extra = turn.text.count(IMAGE_PLACEHOLDER) - len(images)
    if images and (extra == 0 or (extra > 0 and turn.extra_placeholders)):
        placed[IMAGE_PLACEHOLDER] = ([_image_segment(image)] for image in images)
    else:
        front += _image_lines(images)
    if videos and turn.text.count(VIDEO_PLACEHOLDER) == len(videos):
        placed[VIDEO_PLACEHOLDER] = (_frame_lines(video) for video in videos)
    else:
        front += [part for video in videos for part in (*_frame_lines(video), TextSegment("\n"))]
    return merge_segments([*front, *_fill_placeholders(turn.text, placed)])


def media_order(turn: Message) -> list[int]:
    """Return the order of a message's media in the prompt: their indices in ``media``."""
    if turn.texts:
        return [*range(len(turn.media))]
    waiting = {
        mark: [n for n, medium in enumerate(turn.media) if medium.kind == kind]
        for mark, kind in ((IMAGE_PLACEHOLDER, "image"), (VIDEO_PLACEHOLDER, "video"))
    }
    placed = [mark for mark, media in waiting.items() if turn.text.count(mark) == len(media) > 0]
    front = [n for mark, media in waiting.items() if mark not in placed for n in media]
    marks = re.findall("|".join(placed), turn.text) if placed else []
    return front + [waiting[mark].pop(0) for mark in marks]


def merge_segments(segments: Iterable[Segment]) -> list[Segment]:
    """Join adjacent texts of the same kind and drop empty ones."""
    merged: list[Segment] = []
    for segment in segments:
        last = merged[-1] if merged else None
        if (
            isinstance(segment, TextSegment)
            and isinstance(last, TextSegment)
            and last.untrusted == segment.untrusted
        ):
            merged[-1] = TextSegment(last.text + segment.text, last.untrusted)
        elif not isinstance(segment, TextSegment) or segment.text:
            merged.append(segment)
    return merged


def split_at_answers(segments: Sequence[Segment]) -> Iterator[tuple[list[Segment], bool]]:
    """Split segments before and after each answer; yield each part and whether it is an answer."""
    pending: list[Segment] = []
    for segment in segments:
        if isinstance(segment, GeneratedAnswer):
            yield pending, False
            yield [segment], True
            pending = []
        else:
            pending.append(segment)
    yield pending, False


def _image_lines(images: Sequence[MessageMedia]) -> list[Segment]:
    """Return ``<image>`` on a line, or ``Image-1: <image>`` and so on (model card)."""
    lines: list[Segment] = []
    for number, image in enumerate(images, start=1):
        lines += [*_labeled_image(image, number, len(images)), TextSegment("\n")]
    return lines


def _labeled_image(image: MessageMedia, number: int, count: int) -> list[Segment]:
    label = f"Image-{number}: " if count > 1 else ""
    return [TextSegment(label), _image_segment(image)]


def _placed_media(turn: Message) -> Iterator[Segment]:
    """Yield texts and media in their order, each medium on lines of its own."""
    count, number = sum(medium.kind == "image" for medium in turn.media), 0
    before, *after = turn.texts
    yield TextSegment(before, untrusted=True)
    at_line_start = not before or before.endswith("\n")
    for medium, text in zip(turn.media, after, strict=True):
        if not at_line_start:
            yield TextSegment("\n")
        number += medium.kind == "image"
        is_image = medium.kind == "image"
        yield from _labeled_image(medium, number, count) if is_image else _frame_lines(medium)
        at_line_start = text.endswith("\n")
        if text and not text.startswith("\n"):
            yield TextSegment("\n")
        yield TextSegment(text, untrusted=True)


def _frame_lines(video: MessageMedia) -> list[Segment]:
    """Return ``Frame1: <image>`` per frame, joined by newlines; each video counts from 1.

    The format is the model card's; a time follows the number on request: ``Frame1 (0.5s): ``.
    """
    lines: list[Segment] = []
    for index, tiles in enumerate(video.tiles):
        time = f" ({video.times[index]:.1f}s)" if video.times else ""
        break_before = "\n" if index else ""
        lines += [TextSegment(f"{break_before}Frame{index + 1}{time}: "), ImageSegment(tiles)]
    return lines


def _image_segment(image: MessageMedia) -> ImageSegment:
    return ImageSegment(sum(image.tiles))


def _fill_placeholders(text: str, placed: dict[str, Iterator[list[Segment]]]) -> Iterator[Segment]:
    if not placed:
        yield TextSegment(text, untrusted=True)
        return
    parts = re.split("(" + "|".join(placed) + ")", text)
    for index, part in enumerate(parts):
        if index % 2 == 0:
            yield TextSegment(part, untrusted=True)
            continue
        yield from next(placed[part], [TextSegment(part, untrusted=True)])
        # the card ends the frame lines with a newline; the user's own one is enough
        if part == VIDEO_PLACEHOLDER and parts[index + 1] and not parts[index + 1].startswith("\n"):
            yield TextSegment("\n")


# the exact system prompt that InternVL3 was trained with
DEFAULT_SYSTEM = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位"
    "联合开发的多模态大语言模型。"
)


def system_segment(system: str | None, own: str | None) -> TextSegment:
    """Choose the system prompt: the caller's, else the model's own, else the published one.

    A null or empty ``own`` counts as absent: some releases would otherwise prompt with "None".
    """
    if system is not None:
        return TextSegment(system, untrusted=True)
    return TextSegment(own or DEFAULT_SYSTEM)
