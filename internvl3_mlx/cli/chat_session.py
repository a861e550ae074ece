"""A chat as it goes: what was attached, what is asked, how the answer is shown."""

import os
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from internvl3_mlx.cli import console
from internvl3_mlx.cli.input_line import Dropped, open_dropped, read_line
from internvl3_mlx.cli.markdown import MarkdownWriter
from internvl3_mlx.cli.slash_commands import Command, named
from internvl3_mlx.cli.thumbnails import Draw
from internvl3_mlx.errors import InternVL3Error, UserError

if TYPE_CHECKING:
    from internvl3_mlx import Answer, Conversation, Piece
    from internvl3_mlx.generation.processor import Film, Seen

STOPPED = "stopped; what was said is kept"
TAKEN_BACK = "stopped before the first word; the question was taken back"
AS_IT_WAS = "stopped before the first word; the last answer is kept"


@dataclass(frozen=True, eq=False)
class Attached:
    """A picture or a video on the screen's side of the talk."""

    name: str
    content: "Seen | Film"

    @property
    def is_film(self) -> bool:
        return hasattr(self.content, "frames")


@dataclass(eq=False)
class Session:
    """One chat. ``pending``: attached, and sent with the next question."""

    talk: "Conversation"
    draw: Draw | None = None
    quiet: bool = False
    pending: list[Attached] = field(default_factory=list)
    over: bool = False

    def take(self, text: str) -> None:
        """Do what one line says; mistakes are told and the chat goes on."""
        try:
            command = named(text)
            if command is not None:
                self.run(*command)
            elif text.strip():
                self.say(text)
        except InternVL3Error as fault:
            console.error(str(fault))

    def run(self, command: Command, argument: str) -> None:
        if command.wants and not argument:
            raise UserError(f"{command.name} wants {command.wants}")
        command.act(self, argument)

    def say(self, text: str) -> None:
        """Attach the pictures of a line and ask its question."""
        line = read_line(text)
        if line.missing:  # a question about a picture that is not there is never asked
            for fault in line.missing:
                console.error(fault)
            return
        for dropped in line.dropped:
            self.attach(dropped)
        if line.question.strip():
            self.ask(line.question)

    def attach(self, dropped: Dropped) -> None:
        """Open what was dropped, tell what became of it, and keep it for the next question."""
        if dropped.kind == "video":
            film = self.talk.watch(dropped.source)
            self.pending.append(Attached(Path(film.name).name, film))
            tokens = sum(frame.info.tokens for frame in film.frames)
            console.hint(f"{Path(film.name).name} · {len(film.frames)} frames · {tokens:,} tokens")
            return
        for picture in open_dropped(dropped, upright=self.talk.settings.upright):
            seen = self.talk.look(picture)
            name = os.path.basename(seen.info.source) or seen.info.source
            self.pending.append(Attached(name, seen))
            console.hint(about(name, seen))
            if self.draw is not None:
                from internvl3_mlx.images.load import preview_png

                console.raw(self.draw(preview_png(picture)))

    def ask(self, question: str) -> None:
        sent, self.pending = self.pending, []
        pictures = [item.content for item in sent if not item.is_film]
        films = tuple(item.content for item in sent if item.is_film)
        try:
            stream = self.talk.stream(question, pictures, video=films)
            if not self.show(stream):
                self.pending = sent
        except InternVL3Error:
            self.pending = sent
            raise

    def again(self) -> None:
        self.show(self.talk.stream_retry(), nothing_said=AS_IT_WAS)

    def show(self, stream: "Iterator[Piece]", nothing_said: str = TAKEN_BACK) -> bool:
        """Write an answer as it comes. Ctrl-C ends it; return False when nothing was said."""
        before, answer = self.talk.exchanges, None
        writer = answer_writer()
        try:
            with closing(stream):  # type: ignore[type-var]
                for piece in self.patient(stream):
                    writer.add(piece.text)
                    answer = piece.answer
        except KeyboardInterrupt:
            writer.finish()
            said = self.talk.exchanges is not before
            console.end_line()
            console.hint(STOPPED if said else nothing_said)
            return said
        writer.finish()
        if answer is not None:
            self.conclude(answer)
        return True

    def patient(self, stream: "Iterator[Piece]") -> "Iterator[Piece]":
        """Show that something happens until the first piece comes."""
        with console.waiting("reading", quiet=self.quiet):
            first = next(stream, None)
        if first is not None:
            yield first
            yield from stream

    def conclude(self, answer: "Answer") -> None:
        if not self.quiet and console.is_lively(sys.stderr):
            console.figures(answer)
        warning = self.talk.budget.warning
        if warning and not self.quiet:
            console.note(f"{warning} (/set, /drop and /forget do it)")


class PlainWriter:
    """Writes an answer as it comes, and a line end after it."""

    def __init__(self) -> None:
        self.last = ""

    def add(self, text: str) -> None:
        console.answer_text(text)
        self.last = text or self.last

    def finish(self) -> None:
        if not self.last.endswith("\n"):
            console.line()


def answer_writer() -> PlainWriter | MarkdownWriter:
    return MarkdownWriter(sys.stdout) if console.is_lively(sys.stdout) else PlainWriter()


def about(name: str, seen: "Seen") -> str:
    """Describe an attached picture: ``cat.png 1024×768 · 7 tiles · 1,792 tokens``."""
    info = seen.info
    tiles = f"{info.tiles} tile{'s' * (info.tiles != 1)}"
    return f"{name} {info.width}×{info.height} · {tiles} · {info.tokens:,} tokens"
