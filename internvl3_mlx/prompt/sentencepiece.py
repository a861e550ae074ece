"""The sentencepiece vocabulary of the 9B, ``tokenizer.model``, read by the library behind it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from internvl3_mlx.errors import CheckpointError
from internvl3_mlx.prompt.tokenizer_files import AddedToken, bos_name, read_added_tokens
from internvl3_mlx.prompt.vocabulary import SPACE, Lead, Vocabulary, spell_sentencepiece

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


@dataclass(frozen=True)
class Pieces:
    """An open ``tokenizer.model`` and the tokens added to it.

    ``prefixed``: the model's normaliser puts a blank in front of what it cuts.
    """

    model: "SentencePieceProcessor"
    size: int
    added: dict[str, AddedToken]
    bos: str | None
    prefixed: bool


def open_pieces(folder: Path) -> Pieces:
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
    return Pieces(model, size, added, bos_name(folder, default=True), prefixed)


def read_sentencepiece(folder: Path) -> Vocabulary:
    """Read ``tokenizer.model`` and the added tokens beside it.

    Each text between added tokens is cut on its own, its blank in front included where the model's
    normaliser adds one, as InternLM3's own tokenizer does.
    """
    pieces = open_pieces(folder)
    model, size, added, bos = pieces.model, pieces.size, pieces.added, pieces.bos
    lead: Lead = "chunk" if pieces.prefixed else "none"
    return Vocabulary(
        cut=lambda text, at_start: model.encode(text),
        spell=lambda n: spell_sentencepiece(model.id_to_piece(n)) if 0 <= n < size else b"",
        size=size,
        added=added,
        bos_id=added[bos].id if bos in added else None,
        lead=lead,
    )
