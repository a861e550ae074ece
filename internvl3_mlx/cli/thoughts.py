"""Show the thought of an answer while it is generated."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from internvl3_mlx.cli import console

if TYPE_CHECKING:
    from internvl3_mlx import AnswerChunk


def show_thoughts(chunks: "Iterator[AnswerChunk]", *, quiet: bool) -> "Iterator[AnswerChunk]":
    """Yield the chunks of an answer, and show the thought before it unless ``quiet``."""
    is_open = False
    for chunk in chunks:
        if chunk.reasoning and not quiet:
            console.write_thought(chunk.reasoning)
            is_open = True
        if is_open and (chunk.text or chunk.answer is not None):
            console.write_thought("", ended=True)
            is_open = False
        yield chunk
