"""Chains of thought in streamed answers, piece by piece, without the blank lines after them."""

from dataclasses import dataclass, field
from typing import Literal

from internvl3_mlx.generation.thinking import Part, ThoughtSplitter

Piece = tuple[Literal["thinking", "answer"], str]


@dataclass(eq=False)
class ThinkingSplitter:
    """Splits streamed text into labeled pieces; ``ThoughtSplitter`` finds the tags."""

    splitter: ThoughtSplitter = field(default_factory=ThoughtSplitter)
    has_answer_text: bool = False

    def feed(self, text: str, *, last: bool = False) -> list[Piece]:
        """Return what ``text`` makes certain. last: no more text follows."""
        thought, answer = self.splitter.add(text)
        rest = self.splitter.take_pending() if last else ""
        if self.splitter.part is Part.THOUGHT:
            thought += rest
        else:
            answer += rest
        if self.splitter.has_thought and not self.has_answer_text:
            answer = answer.lstrip()
        self.has_answer_text |= bool(answer)
        pieces: list[Piece] = [("thinking", thought)] if thought else []
        return [*pieces, ("answer", answer)] if answer else pieces


def split_thinking(text: str) -> tuple[str, str]:
    """Return the chain of thought and the answer of a whole text; the former may be empty."""
    pieces = ThinkingSplitter().feed(text, last=True)
    kinds = ("thinking", "answer")
    thinking, answer = ("".join(t for k, t in pieces if k == kind) for kind in kinds)
    return thinking, answer
