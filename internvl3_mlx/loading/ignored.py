"""List what a model's JSON files say and this package does not look at, for ``internvl3 info``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl3_mlx.config.keys import (
    CHAT_TABLE,
    GENERATION_TABLE,
    HF_TABLE,
    PROCESSOR_TABLE,
    TEXT_TABLE,
    TOKENIZER_TABLE,
    VISION_TABLE,
    ignored_keys,
)
from internvl3_mlx.config.processor import read_image_processor
from internvl3_mlx.json_files import read_optional_json


def list_ignored_keys(folder: Path, layout: str) -> dict[str, list[str]]:
    """Return the keys without effect by file, and by part of config.json; empty ones left out."""
    config = read_optional_json(folder / "config.json")
    top = HF_TABLE if layout == "hf" else CHAT_TABLE
    found = {"config.json": ignored_keys(config, [top])}
    for part, table in (
        ("vision_config", VISION_TABLE),
        ("llm_config", TEXT_TABLE),
        ("text_config", TEXT_TABLE),
    ):
        content: Any = config.get(part)
        if isinstance(content, Mapping):
            found[f"config.json {part}"] = ignored_keys(content, [table])
    name, processor = read_image_processor(folder)
    found[name] = ignored_keys(processor, [PROCESSOR_TABLE] if layout == "hf" else [])
    for name, table in (
        ("generation_config.json", GENERATION_TABLE),
        ("tokenizer_config.json", TOKENIZER_TABLE),
    ):
        found[name] = ignored_keys(read_optional_json(folder / name), [table])
    return {name: keys for name, keys in found.items() if keys}
