"""Reads the lines of a chat: from a terminal with editing and history, or from a pipe."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from internvl3_mlx.cli import console
from internvl3_mlx.cli.input_line import display_path, media_kind, split_words
from internvl3_mlx.cli.settings import complete_model, complete_setting
from internvl3_mlx.errors import UserError
from internvl3_mlx.files import data_folder

if TYPE_CHECKING:
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

PROMPT = "› "
FENCE = '"""'
MAX_LINE = 2**24  # characters; a data URI of an image may have some millions
LINE_TOO_LONG = f"a line has more than {MAX_LINE:,} characters; name files by their paths"
SAVED_COMMANDS = ("/save", "/load", "/set")  # complete files of conversations, or schemas
EXIT_HINT = "press Ctrl-D or type /exit to leave"


class LineReader(Protocol):
    """Returns the next input; raises EOFError at the end, UserError for a line that is too long."""

    def read(self) -> str: ...


def typed_lines_path() -> Path:
    """Return the file that keeps what was typed over runs."""
    return data_folder() / "typed_lines"


def open_line_reader(commands: list[str], *, keep_lines: bool = False) -> LineReader:
    """Return a reader for the keyboard if there is one, else for the pipe.

    keep_lines: recall lines typed in earlier runs, and keep those of this one.
    """
    keyboard = sys.stdin is not None and sys.stdin.isatty()
    return TerminalReader(commands, keep_lines=keep_lines) if keyboard else PipeReader()


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
            if len(text) > MAX_LINE:
                raise UserError(LINE_TOO_LONG)
        return strip_fence(text)

    def read_raw_line(self) -> str:
        line = sys.stdin.readline(MAX_LINE + 1)
        if not line:
            raise EOFError
        if len(line) > MAX_LINE:
            while line and not line.endswith("\n"):
                line = sys.stdin.readline(MAX_LINE)
            raise UserError(LINE_TOO_LONG)
        return line.rstrip("\n")


class TerminalReader:
    """Reads from a terminal. Enter sends; Alt-Enter, or Enter within a fence, starts a new line."""

    def __init__(self, commands: list[str], *, keep_lines: bool = False):
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import InMemoryHistory
        from prompt_toolkit.output import create_output

        stream = sys.stdout if sys.stdout.isatty() else sys.stderr
        self.session: PromptSession[str] = PromptSession(
            history=open_typed_lines() if keep_lines else InMemoryHistory(),
            output=create_output(stdout=stream),
            multiline=True,
            key_bindings=make_key_bindings(),
            completer=make_completer(commands),
            complete_while_typing=False,
            prompt_continuation="  ",
            enable_suspend=True,  # Ctrl-Z
        )

    def read(self) -> str:
        while True:
            try:
                return strip_fence(self.session.prompt(PROMPT))
            except KeyboardInterrupt:
                if not self.session.default_buffer.text:
                    console.hint(EXIT_HINT)


def open_typed_lines() -> "History":
    """Return a history in a file that only its owner can read; in memory where that fails."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class TypedLines(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError):  # a full disk must not end the chat
                super().store_string(string)

    try:
        path = typed_lines_path()
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except (OSError, UserError):
        return InMemoryHistory()
    return TypedLines(path)


@contextmanager
def without_echo() -> Iterator[None]:
    """Do not echo what is typed meanwhile into the answer; the next prompt shows it."""
    if sys.stdin is None or not sys.stdin.isatty():
        yield
        return
    import termios

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    quiet = [*before]
    quiet[3] = cast(int, quiet[3]) & ~termios.ECHO
    try:
        termios.tcsetattr(descriptor, termios.TCSANOW, quiet)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)


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

    media = PathCompleter(file_filter=is_media_path, expanduser=True)
    saved = PathCompleter(file_filter=is_conversation_path, expanduser=True)

    class ChatCompleter(Completer):
        def get_completions(
            self, document: "Document", complete_event: "CompleteEvent"
        ) -> "Iterator[Completion]":
            typed = document.text_before_cursor
            if re.fullmatch(r"/[a-z?]*", typed):
                found = [name for name in commands if name.startswith(typed)]
                yield from (Completion(name + " ", -len(typed), name) for name in found)
                return
            command, _, argument = typed.partition(" ")
            if (words := complete_argument(command, argument)) is not None:
                start = -len(argument.rpartition(" ")[2] if command == "/set" else argument)
                yield from (Completion(word, start) for word in words)
                return
            paths = saved if command in SAVED_COMMANDS else media
            last = [word for word, _, stop in split_words(typed) if stop == len(typed)][-1:]
            for path in paths.get_completions(Document("".join(last)), complete_event):
                yield Completion(display_path(path.text), path.start_position, display=path.display)

    return ChatCompleter()


def complete_argument(command: str, argument: str) -> list[str] | None:
    """Return what completes the argument of a command; None where it is a path."""
    if command == "/set" and not argument.startswith(("json-schema ", "json_schema ")):
        return [*complete_setting(argument)]
    return complete_model(argument) if command == "/model" else None


def is_conversation_path(name: str) -> bool:
    return os.path.isdir(name) or name.endswith((".zip", ".json"))


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
