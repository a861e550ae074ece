"""A saved conversation: one zip file, and beside it, on request, its prompt cache.

Both are written atomically: a save that is killed leaves the older file as it was.
"""

import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl3_mlx.errors import UserError
from internvl3_mlx.files import atomic_write
from internvl3_mlx.generation.conversation_archive import (
    CONVERSATION_ENTRY,
    READ_ERRORS,
    ConversationArchive,
    checked_options,
    is_conversation_file,
    read_content,
    text,
)
from internvl3_mlx.generation.engine import kv_quantization_for
from internvl3_mlx.generation.exchange import Exchange
from internvl3_mlx.generation.generation_config import (
    GenerationConfig,
    with_overrides,
)
from internvl3_mlx.generation.processor import ProcessedImage, ProcessedVideo
from internvl3_mlx.generation.prompt_cache import PromptCache
from internvl3_mlx.generation.prompt_cache_file import (
    is_prompt_cache,
    load_prompt_cache,
    model_fingerprint,
    save_prompt_cache,
)
from internvl3_mlx.generation.runner import ModelRunner
from internvl3_mlx.write_guards import check_replaceable_file

FORMAT_VERSION = 1
CACHE_SUFFIX = ".safetensors"
# Options that shape the prompt are saved; sampling is up to whoever loads the conversation.
SAVED_FIELDS = (
    "system", "v2pe_delta", "ntk", "max_tiles", "min_tiles", "thumbnail", "upright"
)  # fmt: skip


@dataclass(frozen=True)
class SavedConversation:
    """What a file held. ``has_cache``: its prompt cache was read and is usable."""

    exchanges: list[Exchange]
    generation_config: GenerationConfig
    has_cache: bool


def write_conversation(
    path: Path,
    exchanges: Sequence[Exchange],
    config: GenerationConfig,
    runner: ModelRunner,
    prompt_cache: PromptCache | None,
) -> None:
    """Write a conversation to ``path``, and ``prompt_cache`` to ``path.safetensors``.

    Raises WriteError.
    """
    check_replaceable_file(path, is_conversation_file, "a saved conversation")
    if prompt_cache is not None:
        check_replaceable_file(cache_path(path), is_prompt_cache, "the cache of a conversation")
    fingerprint = model_fingerprint(runner.model)
    content = conversation_to_json(exchanges, config, runner, fingerprint)
    # The cache first: a conversation is complete without its cache, but not the other way.
    if prompt_cache is not None:
        with atomic_write(cache_path(path)) as part:
            save_prompt_cache(part, prompt_cache, fingerprint)
    with atomic_write(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(CONVERSATION_ENTRY, json.dumps(content, ensure_ascii=False))
        for name, image in images_by_hash(exchanges).items():
            file.writestr(f"{name}.npy", npy_bytes(image.tiles))


def read_conversation(
    path: Path, config: GenerationConfig, runner: ModelRunner, prompt_cache: PromptCache
) -> SavedConversation:
    """Read a saved conversation, all or nothing, and fill ``prompt_cache`` if it fits.

    config: the options to start from; those that were saved replace them.
    """
    fingerprint = model_fingerprint(runner.model)
    check_regular_file(path)
    try:
        with zipfile.ZipFile(path) as file:
            content = read_content(file)
            check_tiling(content, runner, path)
            same_model = text(content["fingerprint"]) == fingerprint
            archive = ConversationArchive(
                file,  # another model's vocabulary may differ: its answers are kept as text only
                vocab_size=runner.config.text.vocab_size if same_model else None,
                tokens_per_tile=runner.config.num_image_token,
                tile_size=runner.config.force_image_size,
            )
            exchanges = [archive.exchange(entry) for entry in content["exchanges"]]
            options: Any = checked_options(content["generation_config"])
            restored = with_overrides(config, options)
    except READ_ERRORS as error:
        raise UserError(
            f"cannot read {path}: it is damaged or not a saved conversation; check the path"
        ) from error
    quantization = kv_quantization_for(restored, runner.config.text.head_dim)
    loaded = same_model and load_prompt_cache(
        cache_path(path), prompt_cache, fingerprint, runner.config.text
    )
    return SavedConversation(
        exchanges, restored, loaded and prompt_cache.is_compatible(quantization)
    )


def check_regular_file(path: Path) -> None:
    """Raise UserError unless ``path`` is a regular file: a pipe would be waited for."""
    if not path.exists():
        raise UserError(f"no file at {path}; check the path")
    if not path.is_file():
        raise UserError(f"{path} is not a regular file; name a saved conversation")


def cache_path(path: Path) -> Path:
    return path.with_name(path.name + CACHE_SUFFIX)


def conversation_to_json(
    exchanges: Sequence[Exchange], config: GenerationConfig, runner: ModelRunner, fingerprint: str
) -> dict[str, Any]:
    """Return a conversation as plain values; images are named by their content."""
    return {
        "version": FORMAT_VERSION,
        "model": runner.name,
        "fingerprint": fingerprint,
        "tile_size": runner.config.force_image_size,
        "tokens_per_tile": runner.config.num_image_token,
        "generation_config": {name: json_value(getattr(config, name)) for name in SAVED_FIELDS},
        "exchanges": [
            {
                "question": exchange.question,
                "images": [image_to_json(image) for image in exchange.images],
                "videos": [video_to_json(video) for video in exchange.videos],
                "answer": exchange.answer,
                "token_ids": exchange.token_ids,
                "complete": exchange.complete,
            }
            for exchange in exchanges
        ],
    }


def json_value(value: object) -> object:
    """Return an option as JSON holds it; a fraction as text, which is parsed back exactly."""
    if isinstance(value, list | tuple):
        return [json_value(entry) for entry in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def image_to_json(image: ProcessedImage) -> dict[str, Any]:
    return {"hash": image.content_hash.hex(), **asdict(image.info)}


def video_to_json(video: ProcessedVideo) -> dict[str, Any]:
    frames = [image_to_json(frame) for frame in video.frames]
    return {"name": video.name, "times": video.times, "frames": frames}


def images_by_hash(exchanges: Sequence[Exchange]) -> dict[str, ProcessedImage]:
    return {
        image.content_hash.hex(): image
        for exchange in exchanges
        for image in exchange.processed_images
    }


def npy_bytes(array: NDArray[np.uint8]) -> bytes:
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def check_tiling(content: dict[str, Any], runner: ModelRunner, path: Path) -> None:
    """Raise UserError for a file of a newer version, or whose tiles are another model's."""
    if content["version"] != FORMAT_VERSION:
        raise UserError(f"{path} was saved by a newer version of internvl3-mlx; upgrade it")
    config = runner.config
    saved = (content["tile_size"], content["tokens_per_tile"])
    if saved != (config.force_image_size, config.num_image_token):
        raise UserError(
            f"{path} was saved with {content['model']}, whose tiles are {saved[0]} pixels wide; "
            f"this model's are {config.force_image_size}; load that model"
        )
