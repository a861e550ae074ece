"""Where lines of a chat come from: a terminal with editing and history, or a pipe."""

import os
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from internvl3_mlx.cli import console
from internvl3_mlx.cli.input_line import kind_of, shown, words

if TYPE_CHECKING:
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

SIGN = "› "
FENCE = '"""'
LEAVE = "Ctrl-D or /exit leaves"


class Reader(Protocol):
    """Gives the next thing the user says; raises EOFError at the end."""

    def read(self) -> str: ...


def open_reader(commands: list[str]) -> Reader:
    """Read from the keyboard where there is one, else line by line from the pipe."""
    return Keyboard(commands) if sys.stdin is not None and sys.stdin.isatty() else Pipe()


class Pipe:
    """Reads standard input: a line is a question, between fences several lines are one."""

    def read(self) -> str:
        if sys.stdin is None:
            raise EOFError
        text = self.line()
        while is_open(text):
            try:
                text += "\n" + self.line()
            except EOFError:
                break  # a fence that was never closed ends with the pipe
        return unfenced(text)

    def line(self) -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")


class Keyboard:
    """Reads from a terminal. Enter sends, Alt-Enter or an open fence goes on in a new line."""

    def __init__(self, commands: list[str]):
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import InMemoryHistory
        from prompt_toolkit.output import create_output

        stream = sys.stdout if sys.stdout.isatty() else sys.stderr
        self.session: PromptSession[str] = PromptSession(
            history=InMemoryHistory(),
            output=create_output(stdout=stream),
            multiline=True,
            key_bindings=keys(),
            completer=completer(commands),
            complete_while_typing=False,
            prompt_continuation="  ",
        )

    def read(self) -> str:
        while True:
            try:
                return unfenced(self.session.prompt(SIGN))
            except KeyboardInterrupt:
                if not self.session.default_buffer.text:
                    console.hint(LEAVE)


def keys() -> "KeyBindings":
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: "KeyPressEvent") -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def new_line(event: "KeyPressEvent") -> None:
        event.current_buffer.insert_text("\n")

    return bindings


def completer(commands: list[str]) -> "Completer":
    """Complete commands at the start of the line, and paths of what can be shown anywhere else."""
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    paths = PathCompleter(file_filter=is_shown, expanduser=True)

    class ChatCompleter(Completer):
        def get_completions(
            self, document: "Document", complete_event: "CompleteEvent"
        ) -> "Iterator[Completion]":
            typed = document.text_before_cursor
            if re.fullmatch(r"/[a-z?]*", typed):
                found = [name for name in commands if name.startswith(typed)]
                yield from (Completion(name, -len(typed)) for name in found)
                return
            last = [word for word, _, stop in words(typed) if stop == len(typed)][-1:]
            for path in paths.get_completions(Document("".join(last)), complete_event):
                yield Completion(shown(path.text), path.start_position, display=path.display)

    return ChatCompleter()


def is_shown(name: str) -> bool:
    return os.path.isdir(name) or kind_of(name) is not None


def is_open(text: str) -> bool:
    """Tell whether a fence was opened at the start and not yet closed."""
    text = text.strip()
    return text.startswith(FENCE) and (len(text) < 2 * len(FENCE) or not text.endswith(FENCE))


def unfenced(text: str) -> str:
    inner = text.strip()
    if not inner.startswith(FENCE):
        return text
    return inner.removeprefix(FENCE).removesuffix(FENCE).strip("\n")
