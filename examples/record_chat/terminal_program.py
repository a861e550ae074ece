"""Runs the program in a pseudo-terminal and follows what a person would see."""

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path

MODEL_VARIABLE = "INTERNVL3_MODEL"
TIMEOUT_S = 60  # a busy machine is slow to start Python
# sets up a controlling terminal: without it Ctrl-C is only a character
START = (
    "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "signal.signal(signal.SIGINT, signal.SIG_DFL); "  # ignored where tests run in the background
    "os.execvp(sys.argv[1], sys.argv[1:])"
)
SEQUENCE = re.compile(
    r"\x1b\[(?P<args>[0-9;?]*)(?P<csi>[A-Za-z])|\x1b\][^\a]*\a|\x1b[()].|\x1b[=>]|(?P<char>[^\x1b])",
    re.DOTALL,
)


class Screen:
    """Interprets the escape sequences that move the cursor; keeps lines that scrolled away."""

    def __init__(self, width: int):
        self.width, self.row, self.column = width, 0, 0
        self.lines: list[list[str]] = [[]]

    def feed(self, text: str) -> None:
        for match in SEQUENCE.finditer(text):
            if match["csi"]:
                self.move(match["csi"], match["args"])
            elif match["char"]:
                self.write(match["char"])

    def move(self, letter: str, args: str) -> None:
        number = int(args) if args.isdecimal() else 0
        if letter in "AB":
            self.go_to(max(self.row + max(number, 1) * (-1 if letter == "A" else 1), 0))
        elif letter in "CD":
            self.column = max(self.column + max(number, 1) * (-1 if letter == "D" else 1), 0)
        elif letter == "G":
            self.column = max(number, 1) - 1
        elif letter in "JK":
            line = self.lines[self.row]
            del line[0 if number == 2 else self.column :]
            if letter == "J":
                del self.lines[self.row + 1 :]

    def write(self, char: str) -> None:
        if char == "\n":
            self.go_to(self.row + 1)
        elif char == "\r":
            self.column = 0
        elif char == "\b":
            self.column = max(self.column - 1, 0)
        elif char >= " ":
            if self.column == self.width:
                self.go_to(self.row + 1)
                self.column = 0
            line = self.lines[self.row]
            line += " " * (self.column + 1 - len(line))
            line[self.column] = char
            self.column += 1

    def go_to(self, row: int) -> None:
        self.lines += [[] for _ in range(row + 1 - len(self.lines))]
        self.row = row

    @property
    def text(self) -> str:
        return "\n".join("".join(line).rstrip() for line in self.lines)


class TerminalProgram:
    """Runs a program, by default ours, in its own terminal; end it with ``close``."""

    def __init__(
        self,
        *words: str,
        cwd: Path,
        columns: int = 80,
        program: Sequence[str] = (sys.executable, "-m", "internvl3_mlx"),
        **env: str,
    ):
        self.master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        root = str(Path(__file__).parents[2])
        settings = {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", "PYTHONPATH": root}
        unset = (
            "NO_COLOR",
            "TERM_PROGRAM",
            "TMUX",
            "KITTY_WINDOW_ID",
            "INTERNVL3_MODEL",
            "COLUMNS",
        )
        inherited = {name: value for name, value in os.environ.items() if name not in unset}
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, *program, *words],
            stdin=slave, stdout=slave, stderr=slave, cwd=cwd, start_new_session=True,
            env={**inherited, **settings, **env},
        )  # fmt: skip
        os.close(slave)
        self.raw, self.screen = "", Screen(columns)
        self.bytes = b""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, pattern: str, count: int = 1) -> str:
        """Wait until the screen shows ``pattern`` ``count`` times; return the screen."""
        deadline = time.monotonic() + TIMEOUT_S
        while len(re.findall(pattern, self.screen.text)) < count:
            assert time.monotonic() < deadline, f"no {pattern!r} in\n{self.screen.text[-2000:]}"
            if not self.read() and self.process.poll() is not None:
                raise AssertionError(f"ended without {pattern!r}:\n{self.screen.text[-2000:]}")
        return self.screen.text

    def read(self) -> bool:
        """Read the output so far; return False when there was none for a moment."""
        ready, _, _ = select.select([self.master], [], [], 0.2)
        if not ready:
            return False
        try:
            data = os.read(self.master, 65536)
        except OSError:  # Linux raises it when the other side has closed
            return False
        self.bytes += data
        text = self.bytes.decode(errors="ignore")
        new = text[len(self.raw) :]
        self.raw = text
        self.screen.feed(new)
        return bool(data)

    def wait(self) -> int:
        """Wait for the program to end and return its exit code."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.process.poll() is None and time.monotonic() < deadline:
            self.read()
        while self.read():
            pass
        return self.process.wait(timeout=1)

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self.master)
