"""What a tokenizer is underneath, whatever its files: a cutter, spellings, added tokens."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from internvl3_mlx.errors import CheckpointError
from internvl3_mlx.prompt.tokenizer_files import AddedToken, bos_token, read_added_tokens

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

# Where a blank is put in front of text, and taken off again when reading: nowhere, at the start of
# the prompt, or after every added token as well.
LeadingSpace = Literal["none", "start", "chunk"]

SPACE = "\u2581"  # how sentencepiece writes a blank
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Vocabulary:
    """``cut(text, at_start)`` turns text into ids without looking for added tokens in it.

    ``spell(id)`` gives the bytes a plain id stands for, a part of a character included; ids that
    do not exist stand for nothing. ``size`` counts the plain ids.
    """

    encode: Callable[[str, bool], list[int]]
    token_bytes: Callable[[int], bytes]
    size: int
    added: dict[str, AddedToken]
    bos_id: int | None = None
    leading_space: LeadingSpace = "none"


def byte_level_bytes(piece: str | None) -> bytes:
    """Read a byte-level piece: each character stands for one byte."""
    try:
        return bytes(BYTE_LEVEL_TABLE[character] for character in piece or "")
    except KeyError:  # a whole word put into the vocabulary by hand
        return (piece or "").encode()


def sentencepiece_bytes(piece: str | None) -> bytes:
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


BYTE_LEVEL_TABLE = _byte_alphabet()


@dataclass(frozen=True)
class SentencePieceModel:
    """An open ``tokenizer.model`` and the tokens added to it.

    ``prefixed``: the model's normaliser puts a blank in front of what it cuts.
    """

    model: "SentencePieceProcessor"
    size: int
    added: dict[str, AddedToken]
    bos: str | None
    adds_leading_space: bool


def open_sentencepiece(folder: Path) -> SentencePieceModel:
    """Open ``tokenizer.model``; that class adds the BOS unless told not to, hence the default."""
    from sentencepiece import SentencePieceProcessor

    path = folder / "tokenizer.model"
    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{path} is no sentencepiece model; download it again") from error
    size = model.get_piece_size()
    control = {
        model.id_to_piece(n): AddedToken(n, special=True)
        for n in range(size)
        if model.is_control(n) or model.is_unknown(n)
    }
    added = control | read_added_tokens(folder)
    prefixed = model.decode([SPACE + "a"]) == "a"
    return SentencePieceModel(model, size, added, bos_token(folder, default=True), prefixed)


def read_sentencepiece(folder: Path) -> Vocabulary:
    """Read ``tokenizer.model`` and the added tokens beside it.

    Each text between added tokens is cut on its own, its blank in front included where the model's
    normaliser adds one, as InternLM3's own tokenizer does.
    """
    pieces = open_sentencepiece(folder)
    model, size, added, bos = pieces.model, pieces.size, pieces.added, pieces.bos
    lead: LeadingSpace = "chunk" if pieces.adds_leading_space else "none"
    return Vocabulary(
        encode=lambda text, at_start: model.encode(text),
        token_bytes=lambda n: sentencepiece_bytes(model.id_to_piece(n)) if 0 <= n < size else b"",
        size=size,
        added=added,
        bos_id=added[bos].id if bos in added else None,
        leading_space=lead,
    )
