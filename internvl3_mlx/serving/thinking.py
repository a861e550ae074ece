"""Tell a chain of thought from the answer after it: text in <think> tags at the start."""

from dataclasses import dataclass
from typing import Literal

START, END = "<think>", "</think>"

Piece = tuple[Literal["thinking", "answer"], str]


@dataclass(eq=False)
class ThinkingSplitter:
    """Splits streamed text. What may still become a tag is held back until it is decided."""

    state: Literal["start", "opened", "thinking", "after", "answer"] = "start"
    held: str = ""

    def feed(self, text: str, *, last: bool = False) -> list[Piece]:
        """Return what ``text`` makes certain. last: no more text follows."""
        self.held += text
        pieces: list[Piece] = []
        while self._advance(pieces, last):
            pass
        return pieces

    def _advance(self, pieces: list[Piece], last: bool) -> bool:
        """Take one step; return whether another may follow."""
        if self.state == "start":
            return self._open(last)
        if self.state == "opened":  # blank lines before the thought
            self.held = self.held.lstrip()
            self.state = "thinking" if self.held else "opened"
            return bool(self.held)
        if self.state == "thinking":
            return self._think(pieces, last)
        if self.state == "after":  # blank lines between thought and answer
            self.held = self.held.lstrip()
            self.state = "answer" if self.held else "after"
            return bool(self.held)
        if self.held:
            pieces.append(("answer", self.held))
        self.held = ""
        return False

    def _open(self, last: bool) -> bool:
        begun = self.held.lstrip()
        if begun.startswith(START):
            self.held, self.state = begun[len(START) :], "opened"
            return True
        if START.startswith(begun) and not last:
            return False
        self.state = "answer"
        return True

    def _think(self, pieces: list[Piece], last: bool) -> bool:
        thought, found, rest = self.held.partition(END)
        if found:
            if thought.rstrip():
                pieces.append(("thinking", thought.rstrip()))
            self.held, self.state = rest, "after"
            return True
        keep = 0 if last else _held_back(self.held)
        ready = self.held[: len(self.held) - keep]
        if ready:
            pieces.append(("thinking", ready))
        self.held = self.held[len(ready) :]
        return False


def split_thinking(text: str) -> tuple[str, str]:
    """Return the chain of thought and the answer of a whole text; the former may be empty."""
    pieces = ThinkingSplitter().feed(text, last=True)
    kinds = ("thinking", "answer")
    thinking, answer = ("".join(t for k, t in pieces if k == kind) for kind in kinds)
    return thinking, answer


def _held_back(text: str) -> int:
    """Count the last characters that may be whitespace before the end tag, or begin it."""
    sizes = range(1, min(len(END), len(text) + 1))
    start = max((size for size in sizes if END.startswith(text[-size:])), default=0)
    before = text[: len(text) - start]
    return len(text) - len(before.rstrip())
