"""A chat as it goes: what was attached, what is asked, how the answer is shown."""

import os
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from internvl3_mlx.cli import console
from internvl3_mlx.cli.input_line import MediaSource, open_media, parse_line
from internvl3_mlx.cli.markdown import MarkdownWriter
from internvl3_mlx.cli.slash_commands import SlashCommand, find_command
from internvl3_mlx.cli.thumbnails import ThumbnailEncoder
from internvl3_mlx.errors import InternVL3Error, UserError

if TYPE_CHECKING:
    from internvl3_mlx import Answer, AnswerChunk, Conversation
    from internvl3_mlx.generation.processor import ProcessedImage, ProcessedVideo

STOPPED = "stopped; what was said is kept"
QUESTION_WITHDRAWN = "stopped before the first word; the question was taken back"
ANSWER_UNCHANGED = "stopped before the first word; the last answer is kept"


@dataclass(frozen=True, eq=False)
class Attachment:
    """A picture or a video on the screen's side of the talk."""

    name: str
    content: "ProcessedImage | ProcessedVideo"

    @property
    def is_video(self) -> bool:
        return hasattr(self.content, "frames")


@dataclass(eq=False)
class ChatSession:
    """One chat. ``pending``: attached, and sent with the next question."""

    conversation: "Conversation"
    encode_thumbnail: ThumbnailEncoder | None = None
    quiet: bool = False
    pending: list[Attachment] = field(default_factory=list)
    is_finished: bool = False

    def handle_line(self, text: str) -> None:
        """Do what one line says; mistakes are told and the chat goes on."""
        try:
            command = find_command(text)
            if command is not None:
                self.run_command(*command)
            elif text.strip():
                self.handle_question(text)
        except InternVL3Error as fault:
            console.error(str(fault))

    def run_command(self, command: SlashCommand, argument: str) -> None:
        if command.required and not argument:
            raise UserError(f"{command.name} wants {command.required}")
        command.action(self, argument)

    def handle_question(self, text: str) -> None:
        """Attach the pictures of a line and ask its question."""
        line = parse_line(text)
        if line.problems:  # a question about a picture that is not there is never asked
            for fault in line.problems:
                console.error(fault)
            return
        for dropped in line.media:
            self.attach(dropped)
        if line.question.strip():
            self.ask(line.question)

    def attach(self, dropped: MediaSource) -> None:
        """Open what was dropped, tell what became of it, and keep it for the next question."""
        if dropped.kind == "video":
            film = self.conversation.process_video(dropped.source)
            self.pending.append(Attachment(Path(film.name).name, film))
            tokens = sum(frame.info.tokens for frame in film.frames)
            console.hint(f"{Path(film.name).name} · {len(film.frames)} frames · {tokens:,} tokens")
            return
        for picture in open_media(dropped, upright=self.conversation.generation_config.upright):
            seen = self.conversation.process_image(picture)
            name = os.path.basename(seen.info.source) or seen.info.source
            self.pending.append(Attachment(name, seen))
            console.hint(describe_image(name, seen))
            if self.encode_thumbnail is not None:
                from internvl3_mlx.images.load import preview_png

                console.write_escape_sequence(self.encode_thumbnail(preview_png(picture)))

    def ask(self, question: str) -> None:
        sent, self.pending = self.pending, []
        pictures = [item.content for item in sent if not item.is_video]
        films = tuple(item.content for item in sent if item.is_video)
        try:
            stream = self.conversation.stream(question, pictures, video=films)
            if not self.stream_answer(stream):
                self.pending = sent
        except InternVL3Error:
            self.pending = sent
            raise

    def retry(self) -> None:
        self.stream_answer(self.conversation.stream_retry(), nothing_said=ANSWER_UNCHANGED)

    def stream_answer(
        self, stream: "Iterator[AnswerChunk]", nothing_said: str = QUESTION_WITHDRAWN
    ) -> bool:
        """Write an answer as it comes. Ctrl-C ends it; return False when nothing was said."""
        before, answer = self.conversation.exchanges, None
        writer = make_answer_writer()
        try:
            with closing(stream):  # type: ignore[type-var]
                for piece in self.show_spinner_until_first(stream):
                    writer.add(piece.text)
                    answer = piece.answer
        except KeyboardInterrupt:
            writer.finish()
            said = self.conversation.exchanges is not before
            console.end_line()
            console.hint(STOPPED if said else nothing_said)
            return said
        writer.finish()
        if answer is not None:
            self.show_stats(answer)
        return True

    def show_spinner_until_first(self, stream: "Iterator[AnswerChunk]") -> "Iterator[AnswerChunk]":
        """Show that something happens until the first piece comes."""
        with console.spinner("reading", quiet=self.quiet):
            first = next(stream, None)
        if first is not None:
            yield first
            yield from stream

    def show_stats(self, answer: "Answer") -> None:
        if not self.quiet and console.is_interactive(sys.stderr):
            console.print_stats(answer)
        warning = self.conversation.budget.warning
        if warning and not self.quiet:
            console.note(f"{warning} (/set, /drop and /forget do it)")


class PlainWriter:
    """Writes an answer as it comes, and a line end after it."""

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


def describe_image(name: str, seen: "ProcessedImage") -> str:
    """Describe an attached picture: ``cat.png 1024×768 · 7 tiles · 1,792 tokens``."""
    info = seen.info
    tiles = f"{info.tiles} tile{'s' * (info.tiles != 1)}"
    return f"{name} {info.width}×{info.height} · {tiles} · {info.tokens:,} tokens"
