"""What every tokenizer provides, whatever its files: encode plain text, bytes, added tokens."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from internvl3_mlx.errors import CheckpointError
from internvl3_mlx.prompt.added_tokens import keep
from internvl3_mlx.prompt.tokenizer_files import AddedToken, bos_token, read_added_tokens

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

# Where encoding adds a space and decoding removes it: nowhere, at the start of the prompt, or after
# every added token as well.
LeadingSpace = Literal["none", "start", "chunk"]

SPACE = "\u2581"  # how sentencepiece writes a space
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Vocabulary:
    """``encode(text, at_start)`` turns text into ids, without looking for added tokens in it.

    ``token_bytes(id)`` returns the bytes of a plain id, which may be part of a character, and none
    for ids that do not exist. ``size`` counts the plain ids. ``normalize(text)`` is done to a text
    before ``normalized`` added tokens are looked for.
    """

    encode: Callable[[str, bool], list[int]]
    token_bytes: Callable[[int], bytes]
    size: int
    added: dict[str, AddedToken]
    bos_id: int | None = None
    leading_space: LeadingSpace = "none"
    normalize: Callable[[str], str] = keep


def byte_level_bytes(piece: str | None) -> bytes:
    """Decode a byte-level token: each character represents one byte."""
    try:
        return bytes(BYTE_LEVEL_TABLE[character] for character in piece or "")
    except KeyError:  # a word that was added to the vocabulary by hand
        return (piece or "").encode()


def sentencepiece_bytes(piece: str | None) -> bytes:
    """Decode a sentencepiece token: text with marked spaces, or one byte as ``<0x0A>``."""
    byte = BYTE_PIECE.fullmatch(piece or "")
    return bytes([int(byte[1], 16)]) if byte else (piece or "").replace(SPACE, " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """Map characters to bytes as GPT-2 does: printable Latin-1 stays, others start at 256."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + n): byte for n, byte in enumerate(others)
    }


BYTE_LEVEL_TABLE = _byte_alphabet()


@dataclass(frozen=True)
class SentencePieceModel:
    """An open ``tokenizer.model`` and the tokens added to it.

    ``prefixed``: the model's normalizer adds a space in front of each text.
    """

    model: "SentencePieceProcessor"
    size: int
    added: dict[str, AddedToken]
    bos: str | None
    adds_leading_space: bool


def open_sentencepiece(folder: Path) -> SentencePieceModel:
    """Open ``tokenizer.model``; its tokenizer class adds BOS by default."""
    from sentencepiece import SentencePieceProcessor

    path = folder / "tokenizer.model"
    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{path} is not a sentencepiece model; download it again") from error
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

    Each text between added tokens is encoded on its own, with a leading space where the model's
    normalizer adds one, as InternLM3's own tokenizer does.
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
