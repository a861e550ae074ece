"""The JSON files of a tokenizer: added tokens, BOS and EOS."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl3_mlx.errors import CheckpointError
from internvl3_mlx.files import read_optional_json

# Tags of grounding prompts and answers: the only special tokens a user may type.
GROUNDING_TOKENS = frozenset(
    f"<{slash}{name}>" for name in ("ref", "box", "quad") for slash in ("", "/")
) | frozenset(
    f"<|{name}_{edge}|>" for name in ("object_ref", "box", "quad") for edge in ("start", "end")
)
# Plain text in our prompts, though hf repositories give it an id beyond the embedding's last row.
IGNORED_ADDED_TOKENS = frozenset({"<video>"})
# Qwen's added tokens that are shown in answers.
VISIBLE_PREFIXES = ("tool_", "fim_", "repo_name", "file_sep")


@dataclass(frozen=True)
class AddedToken:
    """A token matched as a whole before the text around it; ``special`` ones are not shown."""

    id: int
    special: bool


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
    config = read_optional_json(folder / "tokenizer_config.json")
    found = {
        entry["content"]: AddedToken(int(number), bool(entry.get("special", False)))
        for number, entry in config.get("added_tokens_decoder", {}).items()
        if "content" in entry
    }
    for token, number in read_optional_json(folder / "added_tokens.json").items():
        special = not token.strip("</|>").startswith(VISIBLE_PREFIXES)
        found.setdefault(token, AddedToken(int(number), special))
    return found


def bos_token(folder: Path, *, default: bool) -> str | None:
    """Return the token that the tokenizer puts in front of every text, if any."""
    config = read_optional_json(folder / "tokenizer_config.json")
    return token_text(config.get("bos_token")) if config.get("add_bos_token", default) else None


def token_text(entry: Any) -> str | None:
    """Return the text of a token entry, which is a string or an object."""
    return entry.get("content") if isinstance(entry, dict) else entry


def eos_token_ids(folder: Path) -> Iterator[int]:
    """List every end-of-sequence id in the model's JSON files, at any of their levels."""
    config = read_optional_json(folder / "config.json")
    levels = (config, config.get("llm_config"), config.get("text_config"))
    for level in (*levels, read_optional_json(folder / "generation_config.json")):
        named = (level or {}).get("eos_token_id")
        yield from [named] if isinstance(named, int) else named or []


def eos_token(folder: Path) -> str | None:
    """Return the tokenizer's own end-of-sequence token."""
    return token_text(read_optional_json(folder / "tokenizer_config.json").get("eos_token"))
