"""A running chat: attached files, the question, and the answer as it is generated."""

import os
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from internvl3_mlx.cli import console
from internvl3_mlx.cli.best_of import BestOfRequest
from internvl3_mlx.cli.endings import SETTING, describe_ending, require_complete
from internvl3_mlx.cli.input_line import MediaSource, media_notes, parse_line, read_media
from internvl3_mlx.cli.markdown import MarkdownWriter
from internvl3_mlx.cli.thoughts import show_thoughts
from internvl3_mlx.cli.thumbnails import ThumbnailEncoder
from internvl3_mlx.errors import ImageError, UserError

if TYPE_CHECKING:
    from internvl3_mlx import VLM, Answer, AnswerChunk, Conversation
    from internvl3_mlx.generation.conversation_log import ConversationLog
    from internvl3_mlx.generation.open_media import OpeningStep
    from internvl3_mlx.generation.processor import ProcessedImage, ProcessedVideo
    from internvl3_mlx.test_time_scaling.critic import Critic

STOPPED = "stopped; the text so far is part of the conversation"
QUESTION_WITHDRAWN = "stopped before the answer began; the question was removed"
ANSWER_UNCHANGED = "stopped before the answer began; the last answer is unchanged"


@dataclass(frozen=True, eq=False)
class Attachment:
    """An image or a video that was attached, with its name on the screen."""

    name: str
    content: "ProcessedImage | ProcessedVideo"

    @property
    def is_video(self) -> bool:
        return hasattr(self.content, "frames")


Described = tuple[Attachment, str, str]  # what is attached, how it is shown, and its thumbnail


@dataclass(frozen=True, eq=False)
class OpenFile:
    """What a file brought. notes: what of it the model does not see."""

    attachments: Sequence[Described]
    notes: Sequence[str] = ()


@dataclass(eq=False)
class ChatSession:
    """One chat.

    ``pending``: attachments that are sent with the next question. ``num_failed``: lines that ended
    in an error. ``debug``: show tracebacks. ``log``: where the conversation is kept, if it is.
    ``load_model``: loads another model by name. ``best_of``: how /best chooses. ``critic``: the
    one it uses, once loaded.
    """

    conversation: "Conversation"
    encode_thumbnail: ThumbnailEncoder | None = None
    quiet: bool = False
    pending: list[Attachment] = field(default_factory=list)
    is_finished: bool = False
    num_failed: int = 0
    debug: bool = False
    log: "ConversationLog | None" = None
    load_model: "Callable[[str], VLM] | None" = None
    best_of: BestOfRequest | None = None
    critic: "Critic | None" = None

    def handle_question(self, text: str) -> None:
        """Attach the files that a line names and ask its question.

        A question about a file that does not exist is not asked.
        """
        line = parse_line(text)
        if line.problems:
            *others, last = line.problems
            for problem in others:
                console.error(problem)
            raise ImageError(last)
        is_asked = bool(line.question.strip())
        self.attach(line.media, is_asked=is_asked)
        if is_asked:
            self.ask(line.question)

    def attach(self, media: Sequence[MediaSource], *, is_asked: bool = False) -> None:
        """Open files, describe them, and add them to the next question.

        While one is described, the next is opened on a thread. is_asked: the question follows at
        once, so the model encodes what is there while more is opened.
        """
        from internvl3_mlx.generation.open_media import encode_while_opening

        steps, count = self.open_steps(media), sum(map(self.count_steps, media))
        encode = self.encode_early if is_asked else leave_for_later
        for opened in encode_while_opening(steps, count, encode):
            for note in opened.notes:
                console.note(note)
            for attachment, description, thumbnail in opened.attachments:
                self.pending.append(attachment)
                console.hint(description)
                if thumbnail:
                    console.write_escape_sequence(thumbnail)

    def encode_early(self, opening: "Sequence[ProcessedImage]") -> None:
        """Encode what is attached. opening: images and frames of the line that is being read."""
        attached = [item.content for item in self.pending]
        with console.spinner("encoding what is attached", quiet=self.quiet):
            self.conversation.encode_early([*attached, *opening])

    def count_steps(self, media: MediaSource) -> int:
        from internvl3_mlx.generation.open_media import count_video_steps

        is_video = media.kind == "video"
        config = self.conversation.generation_config
        return count_video_steps(media.source, config) if is_video else 1

    def open_steps(
        self, media: Sequence[MediaSource]
    ) -> "Generator[OpeningStep[OpenFile], None, None]":
        """Open files one after the other, a video a few frames at a time; called on a thread."""
        from internvl3_mlx.generation.open_media import OpeningStep, open_video_steps

        processor = self.conversation.runner.processor
        config = self.conversation.generation_config
        for one in media:
            if one.kind != "video":
                opened = self.open_images(one)
                images = [item.content for item, *_ in opened.attachments]
                yield OpeningStep(cast("list[ProcessedImage]", images), opened)
                continue
            for step in open_video_steps(processor, one.source, config):
                video = None if step.result is None else describe_video(step.result)
                yield OpeningStep(step.images, video)

    def open_images(self, media: MediaSource) -> "OpenFile":
        """Open an image or every page of a document, each with its thumbnail if there is one."""
        upright = self.conversation.generation_config.upright
        opened, found = read_media(media, upright=upright), list[Described]()
        for image in opened:
            processed, thumbnail = self.conversation.process_image(image), ""
            _ = processed.content_hash  # computed here, it costs the vision model no time
            name = os.path.basename(processed.info.source) or processed.info.source
            if self.encode_thumbnail is not None:
                from internvl3_mlx.images.load import preview_png

                thumbnail = self.encode_thumbnail(preview_png(image))
            found.append((Attachment(name, processed), describe_image(name, processed), thumbnail))
        return OpenFile(found, media_notes(opened))

    def ask(self, question: str) -> None:
        """Ask a question with the pending attachments; they stay pending if that fails."""
        from internvl3_mlx.generation.exchange import Exchange
        from internvl3_mlx.generation.processor import ProcessedImage, ProcessedVideo

        sent, self.pending = self.pending, []
        contents = [item.content for item in sent]
        images = [content for content in contents if isinstance(content, ProcessedImage)]
        videos = [content for content in contents if isinstance(content, ProcessedVideo)]
        before = self.conversation.exchanges
        if self.log is not None:
            exchange = Exchange(question, tuple(images), tuple(videos))
            self.log.add_question(exchange, self.conversation.generation_config)
        try:
            self.stream_answer(self.conversation.stream(question, images, video=videos))
        finally:
            if self.conversation.exchanges is before:
                self.pending = sent

    def log_question_again(self) -> None:
        """Log the last question before it is answered again."""
        if self.log is not None and self.conversation.exchanges:
            last = replace(self.conversation.exchanges[-1], answer="", token_ids=())
            self.log.add_question(last, self.conversation.generation_config)

    def retry(self) -> None:
        self.log_question_again()
        self.stream_answer(self.conversation.stream_retry(), if_empty=ANSWER_UNCHANGED)

    def change_model(self, name: str) -> None:
        """Continue the conversation with another model; raise UserError where that cannot be."""
        if self.load_model is None:
            raise UserError("this chat cannot change its model; start another with --model")
        vlm = self.load_model(name)
        self.conversation = self.conversation.with_runner(
            vlm.runner, [item.content for item in self.pending]
        )
        if self.log is not None:
            from internvl3_mlx.generation.conversation_log import describe_model

            self.log.change_start(describe_model(vlm.runner, {"model": name}))
        console.hint(f"the conversation continues with {vlm.name}")

    def update_log(self) -> None:
        """Log what has changed; a fault ends the log with a note, not the conversation."""
        if self.log is None:
            return
        self.log.update(self.conversation.exchanges, self.conversation.generation_config)
        if self.log.fault is not None:
            reason = getattr(self.log.fault, "strerror", None) or self.log.fault
            console.note(f"this conversation is no longer kept: {reason}")
            self.close_log()

    def close_log(self) -> None:
        """Close the file of the conversation, and keep nothing from now on."""
        if self.log is not None:
            self.log.close()
        self.log = None

    def start_new_log(self) -> None:
        if self.log is not None:
            self.log.start_over()

    def reopen_last_question(self) -> str:
        """Undo the last question, make its attachments pending again, and return its text."""
        last = self.conversation.undo()
        reopened = [Attachment(Path(image.info.source).name, image) for image in last.images]
        reopened += [Attachment(Path(video.name).name, video) for video in last.videos]
        self.pending[:0] = reopened
        return last.question

    def stream_answer(
        self, stream: "Iterator[AnswerChunk]", if_empty: str = QUESTION_WITHDRAWN
    ) -> None:
        """Write an answer as it is generated."""
        before, answer = self.conversation.exchanges, None
        writer = make_answer_writer()
        try:
            with closing(stream):  # type: ignore[type-var]
                chunks = self.show_spinner_until_first(stream)
                for chunk in show_thoughts(chunks, quiet=self.quiet):
                    if self.log is not None:
                        self.log.add_text(chunk.text)
                    writer.add(chunk.text)
                    answer = chunk.answer
        except KeyboardInterrupt:
            writer.finish()
            recorded = self.conversation.exchanges is not before
            console.end_line()
            console.hint(STOPPED if recorded else if_empty)
            return
        writer.finish()
        if answer is not None:
            self.show_stats(answer)
            config = self.conversation.generation_config
            ending = describe_ending(require_complete(answer, config, SETTING), config, SETTING)
            if ending and not self.quiet:
                console.note(ending)

    def show_spinner_until_first(self, stream: "Iterator[AnswerChunk]") -> "Iterator[AnswerChunk]":
        with console.spinner("processing the prompt", quiet=self.quiet):
            first = next(stream, None)
        if first is not None:
            yield first
            yield from stream

    def show_stats(self, answer: "Answer") -> None:
        if not self.quiet and console.is_interactive(sys.stderr):
            console.print_stats(answer)
        warning = self.conversation.budget.warning
        if warning and not self.quiet:
            console.note(f"{warning} (with /set, /drop and /forget)")


class PlainWriter:
    """Writes an answer as it is generated, and ends its last line."""

    def __init__(self) -> None:
        self.last_text = ""

    def add(self, text: str) -> None:
        console.write_answer(text)
        self.last_text = text or self.last_text

    def finish(self) -> None:
        if not self.last_text.endswith("\n"):
            console.write_line()


def make_answer_writer() -> PlainWriter | MarkdownWriter:
    return MarkdownWriter(sys.stdout) if console.is_interactive(sys.stdout) else PlainWriter()


def describe_image(name: str, image: "ProcessedImage") -> str:
    """Describe an attached image, such as ``cat.png 1024×768 · 7 tiles · 1,792 tokens``."""
    info = image.info
    tiles = console.format_count(info.tiles, "tile")
    return f"{name} {info.width}×{info.height} · {tiles} · {info.tokens:,} tokens"


def leave_for_later(_: "Sequence[ProcessedImage]") -> None:
    """Encode nothing yet."""


def describe_video(video: "ProcessedVideo") -> OpenFile:
    """Describe an attached video, such as ``clip.mp4 · 8 frames · 2,048 tokens``."""
    name = Path(video.name).name
    tokens = sum(frame.info.tokens for frame in video.frames)
    described = f"{name} · {len(video.frames)} frames · {tokens:,} tokens"
    return OpenFile([(Attachment(name, video), described, "")])
