"""The JSON files of a tokenizer: added tokens, BOS and EOS."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl3_mlx.config.keys import GENERATION_TABLE, TOKENIZER_TABLE, check_values
from internvl3_mlx.errors import CheckpointError
from internvl3_mlx.json_files import read_optional_json

# Tags of grounding prompts and answers, which an answer can be asked to keep.
THINKING_TOKENS = frozenset({"<think>", "</think>"})
GROUNDING_TOKENS = frozenset(
    f"<{slash}{name}>" for name in ("ref", "box", "quad") for slash in ("", "/")
) | frozenset(
    f"<|{name}_{edge}|>" for name in ("object_ref", "box", "quad") for edge in ("start", "end")
)
# The structure of GPT-OSS's messages; a tokenizer with these writes them.
START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
END, RETURN, CALL, CONSTRAIN = "<|end|>", "<|return|>", "<|call|>", "<|constrain|>"
HARMONY_TOKENS = frozenset((START, END, CHANNEL, MESSAGE, RETURN, CALL, CONSTRAIN))
# Structure of a prompt: typed by a user or written in a training answer, these stay plain text.
CONTROL_TOKENS = (
    frozenset(
        ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<|endoftext|>")
        + ("<s>", "</s>", "<unk>", "<pad>")
    )
    | HARMONY_TOKENS
)
# Plain text in our prompts, though hf repositories give it an id beyond the embedding's last row.
IGNORED_ADDED_TOKENS = frozenset({"<video>"})
# Qwen's added tokens that are shown in answers.
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
ID = re.compile("[0-9]{1,9}")
VISIBLE_PREFIXES = ("tool_", "fim_", "repo_name", "file_sep")


@dataclass(frozen=True)
class AddedToken:
    """A token matched as a whole before the text around it; ``special`` ones are not shown.

    ``lstrip`` and ``rstrip``: it takes the whitespace on that side with it. ``single_word``: it is
    none inside of a word. ``normalized``: it is looked for in the normalized text.
    """

    id: int
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


def read_optional_text(path: Path) -> str | None:
    """Read an optional text file: None when there is no such file."""
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text; download it again") from error


def read_added_tokens(folder: Path) -> dict[str, AddedToken]:
    """Read added tokens from tokenizer_config.json and added_tokens.json.

    The latter does not say which are special: all are but ``SHOWN``, as in the former.
    """
    config = read_tokenizer_config(folder)
    table, listed = (
        config.get("added_tokens_decoder") or {},
        read_optional_json(folder / "added_tokens.json"),
    )
    check_added_tokens(table, listed, folder)
    found = {
        entry["content"]: AddedToken(
            int(number),
            bool(entry.get("special", False)),
            *(bool(entry.get(name, False)) for name in FLAGS),
        )
        for number, entry in table.items()
    }
    for token, number in listed.items():
        special = not token.strip("</|>").startswith(VISIBLE_PREFIXES)
        found.setdefault(token, AddedToken(int(number), special))
    return found


def bos_token(folder: Path, *, default: bool) -> str | None:
    """Return the token that the tokenizer puts in front of every text, if any."""
    config = read_tokenizer_config(folder)
    return token_text(config.get("bos_token")) if config.get("add_bos_token", default) else None


def token_text(entry: Any) -> str | None:
    """Return the text of a token entry, which is a string or an object."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None


def eos_token_ids(folder: Path) -> Iterator[int]:
    """List every end-of-sequence id in the model's JSON files, at any of their levels."""
    config = read_optional_json(folder / "config.json")
    generation = read_optional_json(folder / "generation_config.json")
    check_values(generation, GENERATION_TABLE, "generation_config.json")
    levels = (config, config.get("llm_config"), config.get("text_config"), generation)
    for level in levels:
        named = level.get("eos_token_id") if isinstance(level, dict) else None
        yield from [named] if isinstance(named, int) else named or []


def eos_token(folder: Path) -> str | None:
    """Return the tokenizer's own end-of-sequence token."""
    return token_text(read_tokenizer_config(folder).get("eos_token"))


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Read tokenizer_config.json. Raises ConfigError for a value that we cannot follow."""
    config = read_optional_json(folder / "tokenizer_config.json")
    check_values(config, TOKENIZER_TABLE, "tokenizer_config.json")
    return config


def check_added_tokens(table: dict[str, Any], listed: dict[str, Any], folder: Path) -> None:
    """Raise CheckpointError for an added token without a text or an id."""
    described = ((n, e.get("content")) for n, e in table.items() if isinstance(e, dict))
    numbered = ((str(n), text) for text, n in listed.items() if type(n) is int)
    entries = [*described, *numbered]
    if len(entries) < len(table) + len(listed) or not all(
        isinstance(text, str) and text and ID.fullmatch(number) for number, text in entries
    ):
        raise CheckpointError(
            f"the added tokens in {folder} are not texts with ids; download the tokenizer again"
        )
