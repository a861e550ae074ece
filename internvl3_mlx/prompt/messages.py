"""What a conversation is made of, and where the pictures of a turn stand in its text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
import re
from collections.abc import Iterable, Iterator
from typing import Literal

from internvl3_mlx.errors import PromptError

IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"


@dataclass(frozen=True)
class MessageMedia:
    """One picture or video: how many tiles each of its runs takes.

    A picture has one entry in ``tiles`` (more are laid into one run), a video one per frame.
    ``times`` (seconds, one per frame) is set only when the prompt is to name them.
    """

    tiles: tuple[int, ...]
    kind: Literal["image", "video"] = "image"
    times: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.tiles or min(self.tiles) < 1:
            raise PromptError(
                f"{self.kind} with tiles {self.tiles}: every picture and frame has at least one"
            )
        if self.times is not None and (self.kind != "video" or len(self.times) != len(self.tiles)):
            raise PromptError(
                f"{len(self.times)} frame times for {self.kind} with {len(self.tiles)} entries: "
                "give a video one time per frame"
            )


@dataclass(frozen=True)
class Message:
    """One message. Only the user's carry pictures.

    ``token_ids``: of an answer, the ids that were generated. Its text cut anew may give others;
    with them a prompt repeats what was said to the token.
    """

    role: Literal["user", "assistant"]
    text: str
    media: tuple[MessageMedia, ...] = ()
    token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.role not in ("user", "assistant"):
            raise PromptError(
                f"turn with role {self.role!r}: use 'user' or 'assistant'; "
                "the system text is given apart"
            )
        if self.media and self.role != "user":
            raise PromptError("pictures in an assistant turn: move them to the user's turn")
        if self.token_ids and self.role != "assistant":
            raise PromptError("token ids in a user's turn: only generated answers have them")


@dataclass(frozen=True)
class TextSegment:
    """A stretch of prompt. In ``typed`` text, structural special tokens stay plain text."""

    text: str
    untrusted: bool = False


@dataclass(frozen=True)
class ImageSegment:
    """The place of one picture or frame: <img>, its context tokens, </img>."""

    tiles: int


@dataclass(frozen=True)
class GeneratedAnswer:
    """An answer as it was generated, token by token."""

    token_ids: tuple[int, ...]


Segment = TextSegment | ImageSegment | GeneratedAnswer


def check_messages(turns: Sequence[Message]) -> None:
    """Raise ``PromptError`` unless the conversation ends with the user."""
    if not turns or turns[-1].role != "user":
        given = f"ends with {turns[-1].role!r}" if turns else "is empty"
        raise PromptError(f"the conversation {given}: its last turn must be the user's")


def message_segments(turn: Message) -> list[Segment]:
    """Lay out one turn in the form the model was trained on.

    Marks the user typed place the pictures when there are as many marks as pictures; otherwise
    the pictures stand in front (images, then the frames of videos) and the marks stay text.
    """
    if turn.token_ids:
        return [GeneratedAnswer(turn.token_ids)]
    images = [medium for medium in turn.media if medium.kind == "image"]
    videos = [medium for medium in turn.media if medium.kind == "video"]
    front: list[Segment] = []
    placed: dict[str, Iterator[list[Segment]]] = {}
    if images and turn.text.count(IMAGE_PLACEHOLDER) == len(images):
        placed[IMAGE_PLACEHOLDER] = ([_image_segment(image)] for image in images)
    else:
        front += _image_lines(images)
    if videos and turn.text.count(VIDEO_PLACEHOLDER) == len(videos):
        placed[VIDEO_PLACEHOLDER] = (_frame_lines(video) for video in videos)
    else:
        front += [part for video in videos for part in (*_frame_lines(video), TextSegment("\n"))]
    return merge_segments([*front, *_fill_placeholders(turn.text, placed)])


def media_order(turn: Message) -> list[int]:
    """Say in which order the prompt shows a turn's media: their indices in ``turn.media``."""
    waiting = {
        mark: [n for n, medium in enumerate(turn.media) if medium.kind == kind]
        for mark, kind in ((IMAGE_PLACEHOLDER, "image"), (VIDEO_PLACEHOLDER, "video"))
    }
    placed = [mark for mark, media in waiting.items() if turn.text.count(mark) == len(media) > 0]
    front = [n for mark, media in waiting.items() if mark not in placed for n in media]
    marks = re.findall("|".join(placed), turn.text) if placed else []
    return front + [waiting[mark].pop(0) for mark in marks]


def merge_segments(segments: Iterable[Segment]) -> list[Segment]:
    """Join neighbouring texts of one kind and drop empty ones."""
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


def _image_lines(images: Sequence[MessageMedia]) -> list[Segment]:
    """Write ``<image>`` alone on a line, or ``Image-1: <image>`` and so on (model card)."""
    lines: list[Segment] = []
    for number, image in enumerate(images, start=1):
        label = f"Image-{number}: " if len(images) > 1 else ""
        lines += [TextSegment(label), _image_segment(image), TextSegment("\n")]
    return lines


def _frame_lines(video: MessageMedia) -> list[Segment]:
    """Write ``Frame1: <image>`` per frame, joined by newlines; each video counts from 1.

    The form is the model card's; a time, when asked for, follows the number: ``Frame1 (0.5s): ``.
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
        yield from next(placed[part])
        # the card ends the frame lines with a newline; the user's own one is enough
        if part == VIDEO_PLACEHOLDER and parts[index + 1] and not parts[index + 1].startswith("\n"):
            yield TextSegment("\n")


# the system text that InternVL3 was trained with, to the letter
DEFAULT_SYSTEM = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位"
    "联合开发的多模态大语言模型。"
)


def system_segment(system: str | None, own: str | None) -> TextSegment:
    """Choose the system text: the caller's, else the model's own, else the published one.

    A null or empty ``own`` counts as absent: some releases would otherwise prompt with "None".
    """
    if system is not None:
        return TextSegment(system, untrusted=True)
    return TextSegment(own or DEFAULT_SYSTEM)
