"""Reads the lines of a chat: from a terminal with editing and history, or from a pipe."""

import os
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from internvl3_mlx.cli import console
from internvl3_mlx.cli.input_line import display_path, media_kind, split_words

if TYPE_CHECKING:
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

PROMPT = "› "
FENCE = '"""'
EXIT_HINT = "press Ctrl-D or type /exit to leave"


class LineReader(Protocol):
    """Returns the next input; raises EOFError at the end."""

    def read(self) -> str: ...


def open_line_reader(commands: list[str]) -> LineReader:
    """Return a reader for the keyboard if there is one, else for the pipe."""
    return (
        TerminalReader(commands) if sys.stdin is not None and sys.stdin.isatty() else PipeReader()
    )


class PipeReader:
    """Reads standard input: one question per line, or several lines between fences."""

    def read(self) -> str:
        if sys.stdin is None:
            raise EOFError
        text = self.read_raw_line()
        while has_open_fence(text):
            try:
                text += "\n" + self.read_raw_line()
            except EOFError:
                break  # the end of the pipe closes a fence
        return strip_fence(text)

    def read_raw_line(self) -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")


class TerminalReader:
    """Reads from a terminal. Enter sends; Alt-Enter, or Enter within a fence, starts a new line."""

    def __init__(self, commands: list[str]):
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import InMemoryHistory
        from prompt_toolkit.output import create_output

        stream = sys.stdout if sys.stdout.isatty() else sys.stderr
        self.session: PromptSession[str] = PromptSession(
            history=InMemoryHistory(),
            output=create_output(stdout=stream),
            multiline=True,
            key_bindings=make_key_bindings(),
            completer=make_completer(commands),
            complete_while_typing=False,
            prompt_continuation="  ",
        )

    def read(self) -> str:
        while True:
            try:
                return strip_fence(self.session.prompt(PROMPT))
            except KeyboardInterrupt:
                if not self.session.default_buffer.text:
                    console.hint(EXIT_HINT)


def make_key_bindings() -> "KeyBindings":
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: "KeyPressEvent") -> None:
        buffer = event.current_buffer
        if has_open_fence(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def new_line(event: "KeyPressEvent") -> None:
        event.current_buffer.insert_text("\n")

    return bindings


def make_completer(commands: list[str]) -> "Completer":
    """Complete commands at the start of a line, and paths of images elsewhere."""
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    paths = PathCompleter(file_filter=is_media_path, expanduser=True)

    class ChatCompleter(Completer):
        def get_completions(
            self, document: "Document", complete_event: "CompleteEvent"
        ) -> "Iterator[Completion]":
            typed = document.text_before_cursor
            if re.fullmatch(r"/[a-z?]*", typed):
                found = [name for name in commands if name.startswith(typed)]
                yield from (Completion(name, -len(typed)) for name in found)
                return
            last = [word for word, _, stop in split_words(typed) if stop == len(typed)][-1:]
            for path in paths.get_completions(Document("".join(last)), complete_event):
                yield Completion(display_path(path.text), path.start_position, display=path.display)

    return ChatCompleter()


def is_media_path(name: str) -> bool:
    return os.path.isdir(name) or media_kind(name) is not None


def has_open_fence(text: str) -> bool:
    """Return whether a fence was opened at the start and not closed yet."""
    text = text.strip()
    return text.startswith(FENCE) and (len(text) < 2 * len(FENCE) or not text.endswith(FENCE))


def strip_fence(text: str) -> str:
    inner = text.strip()
    if not inner.startswith(FENCE):
        return text
    return inner.removeprefix(FENCE).removesuffix(FENCE).strip("\n")
