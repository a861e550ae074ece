"""What a tokenizer is underneath, whatever its files: a cutter, spellings, added tokens."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from internvl3_mlx.prompt.tokenizer_files import AddedToken

# Where a blank is put in front of text, and taken off again when reading: nowhere, at the start of
# the prompt, or after every added token as well.
Lead = Literal["none", "start", "chunk"]

SPACE = "\u2581"  # how sentencepiece writes a blank
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Vocabulary:
    """``cut(text, at_start)`` turns text into ids without looking for added tokens in it.

    ``spell(id)`` gives the bytes a plain id stands for, a part of a character included; ids that
    do not exist stand for nothing. ``size`` counts the plain ids.
    """

    cut: Callable[[str, bool], list[int]]
    spell: Callable[[int], bytes]
    size: int
    added: dict[str, AddedToken]
    bos_id: int | None = None
    lead: Lead = "none"


def spell_byte_level(piece: str | None) -> bytes:
    """Read a byte-level piece: each character stands for one byte."""
    try:
        return bytes(BYTE_OF[character] for character in piece or "")
    except KeyError:  # a whole word put into the vocabulary by hand
        return (piece or "").encode()


def spell_sentencepiece(piece: str | None) -> bytes:
    """Read a sentencepiece piece: text with marked blanks, or one byte as ``<0x0A>``."""
    byte = BYTE_PIECE.fullmatch(piece or "")
    return bytes([int(byte[1], 16)]) if byte else (piece or "").replace(SPACE, " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """Map characters to bytes as GPT-2 does: printable Latin-1 is itself, others start at 256."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + n): byte for n, byte in enumerate(others)
    }


BYTE_OF = _byte_alphabet()
