"""``tokenizer.json`` for repositories that have none, from vocab.json and merges.txt or from a
sentencepiece model, so that the tokenizers library is enough to run the model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl3_mlx.prompt.tokenizer import QWEN_SPLIT
from internvl3_mlx.prompt.tokenizer_files import (
    AddedToken,
    read_added_tokens,
    read_optional_json,
    read_optional_text,
)
from internvl3_mlx.prompt.vocabulary import SPACE, open_sentencepiece

Json = dict[str, Any]

VERSION = "1.0"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}


def build_fast_tokenizer(folder: Path) -> Json | None:
    """Build the content of tokenizer.json; None when the folder has no tokenizer."""
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return byte_level_tokenizer(folder)
    if (folder / "tokenizer.model").is_file():
        return sentencepiece_tokenizer(folder)
    return None


def byte_level_tokenizer(folder: Path) -> Json:
    """Build what Qwen2's tokenizer class makes of vocab.json and merges.txt."""
    vocab = read_optional_json(folder / "vocab.json")
    lines = (read_optional_text(folder / "merges.txt") or "").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    split = {"Regex": QWEN_SPLIT}
    return tokenizer_json(
        {"type": "BPE", "vocab": vocab, "merges": merges, "fuse_unk": False},
        read_added_tokens(folder),
        normalizer={"type": "NFC"},
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": split, "behavior": "Isolated", "invert": False},
                {**BYTE_LEVEL, "use_regex": False},
            ],
        },
        decoder={**BYTE_LEVEL, "use_regex": True},
    )


def sentencepiece_tokenizer(folder: Path) -> Json:
    """Express sentencepiece's BPE as merges: two pieces merge when their union is a piece, the most
    likely union first."""
    pieces = open_sentencepiece(folder)
    model, added, bos, prefixed = pieces.model, pieces.added, pieces.bos, pieces.adds_leading_space
    vocab = {model.id_to_piece(n): n for n in range(pieces.size)}
    scores = {model.id_to_piece(n): model.get_score(n) for n in range(pieces.size)}
    unknown = model.id_to_piece(model.unk_id())
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps = [{"type": "Prepend", "prepend": SPACE}, blanks] if prefixed else [blanks]
    return tokenizer_json(
        {
            "type": "BPE",
            "vocab": vocab,
            "merges": find_merges(vocab, scores),
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": True,
        },
        added,
        normalizer={"type": "Sequence", "normalizers": steps},
        pre_tokenizer=None,
        decoder=sentencepiece_decoder(prefixed),
        post_processor=bos_post_processor(bos, added) if bos in added else None,
    )


def find_merges(vocab: Mapping[str, int], scores: Mapping[str, float]) -> list[list[str]]:
    """List the pairs whose union is a piece, the most likely union first."""
    found: list[tuple[float, list[str]]] = []
    for piece in vocab:
        pairs = [
            [piece[:at], piece[at:]]
            for at in range(1, len(piece))
            if piece[:at] in vocab and piece[at:] in vocab
        ]
        pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        found += [(scores[piece], pair) for pair in pairs]
    found.sort(key=lambda entry: -entry[0])
    return [pair for _, pair in found]


def sentencepiece_decoder(prefixed: bool) -> Json:
    """Turn pieces back into text; ``prefixed``: without the space that was put in front."""
    steps: list[Json] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefixed:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def bos_post_processor(bos: str, added: Mapping[str, AddedToken]) -> Json:
    """Put the BOS token in front of every text."""
    text: Json = {"Sequence": {"id": "A", "type_id": 0}}
    first: Json = {"SpecialToken": {"id": bos, "type_id": 0}}
    pair = [first, text, {"Sequence": {"id": "B", "type_id": 1}}]
    tokens = {bos: {"id": bos, "ids": [added[bos].id], "tokens": [bos]}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": pair,
        "special_tokens": tokens,
    }


def tokenizer_json(
    model: Json,
    added: Mapping[str, AddedToken],
    *,
    normalizer: Json | None,
    pre_tokenizer: Json | None,
    decoder: Json,
    post_processor: Json | None = None,
) -> Json:
    """Assemble tokenizer.json from its parts."""
    defaults: Json = {
        **dict.fromkeys(("dropout", "continuing_subword_prefix", "end_of_word_suffix")),
        "unk_token": None,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    matching = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokens = sorted(added.items(), key=lambda item: item[1].id)
    return {
        "version": VERSION,
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token.id, "content": content, **matching, "special": token.special}
            for content, token in tokens
        ],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": decoder,
        "model": {**defaults, **model},
    }
