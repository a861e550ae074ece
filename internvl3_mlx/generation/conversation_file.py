"""A talk on disk: one zip file, and beside it, if wanted, what was read (``prefix_file``).

Both are written under another name first and renamed when whole, so that a save that is killed
leaves the older file as it was.
"""

import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import error as ZlibError

import numpy as np

from internvl3_mlx.errors import UserError
from internvl3_mlx.generation.engine import kv_quantization_for
from internvl3_mlx.generation.exchange import Exchange
from internvl3_mlx.generation.generation_config import with_overrides
from internvl3_mlx.generation.processor import ImageInfo, ProcessedImage, ProcessedVideo
from internvl3_mlx.generation.prompt_cache_file import (
    load_prompt_cache,
    model_fingerprint,
    save_prompt_cache,
)

if TYPE_CHECKING:
    from internvl3_mlx.generation.conversation import Conversation

FORMAT_VERSION = 1
CONVERSATION_ENTRY = "talk.json"
CACHE_SUFFIX = ".safetensors"
# what shapes the prompt goes along; how answers are sampled belongs to the listener
SAVED_FIELDS = ("system", "v2pe_delta", "ntk", "max_tiles", "min_tiles", "thumbnail", "upright")
READ_ERRORS = (OSError, zipfile.BadZipFile, ZlibError, ValueError, KeyError, TypeError, EOFError)


def write_conversation(talk: "Conversation", path: Path, *, cache: bool) -> None:
    """Write the talk to ``path``; with ``cache`` its keys and values to ``path.safetensors``."""
    try:
        if cache:  # first: a talk without its cache is whole, a cache without its talk is not
            with replacing(cache_path(path)) as part:
                save_prompt_cache(part, talk.prompt_cache, model_fingerprint(talk.vlm.model))
        with replacing(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr(
                CONVERSATION_ENTRY, json.dumps(conversation_to_json(talk), ensure_ascii=False)
            )
            for key, seen in images_by_hash(talk.exchanges).items():
                file.writestr(f"{key}.npy", npy_bytes(seen.tiles))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; try elsewhere") from error


def read_conversation(talk: "Conversation", path: Path) -> bool:
    """Put the saved talk into ``talk``, all or nothing; tell whether its cache could be used."""
    try:
        with zipfile.ZipFile(path) as file:
            content = json.loads(file.read(CONVERSATION_ENTRY))
            check_tiling(content, talk, path)
            exchanges = [exchange_from_json(entry, file) for entry in content["exchanges"]]
            settings = {name: content["settings"][name] for name in SAVED_FIELDS}
            same_model = content["fingerprint"] == model_fingerprint(talk.vlm.model)
    except FileNotFoundError as error:
        raise UserError(f"no file at {path}; check the path") from error
    except READ_ERRORS as error:
        raise UserError(f"cannot read {path}: it is no saved talk, or damaged") from error
    if not same_model:  # another vocabulary, perhaps: its words are read, not its ids
        exchanges = [entry.without_token_ids() for entry in exchanges]
    talk.generation_config = with_overrides(talk.generation_config, settings)
    talk.exchanges = exchanges
    read = same_model and load_prompt_cache(
        cache_path(path), talk.prompt_cache, content["fingerprint"]
    )
    return read and talk.prompt_cache.is_compatible(
        kv_quantization_for(talk.generation_config, talk.vlm.config.text.head_dim)
    )


def cache_path(path: Path) -> Path:
    return path.with_name(path.name + CACHE_SUFFIX)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name to write to; it takes the place of ``path`` once the body is through."""
    part = path.with_name(f".{path.name}.{os.getpid()}{CACHE_SUFFIX}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def conversation_to_json(talk: "Conversation") -> dict[str, Any]:
    """Put a talk into plain values; pictures are named by their content."""
    config = talk.vlm.config
    return {
        "version": FORMAT_VERSION,
        "model": talk.vlm.name,
        "fingerprint": model_fingerprint(talk.vlm.model),
        "tile_size": config.force_image_size,
        "tokens_per_tile": config.num_image_token,
        "settings": {
            name: json_value(getattr(talk.generation_config, name)) for name in SAVED_FIELDS
        },
        "exchanges": [
            {
                "question": exchange.question,
                "pictures": [image_to_json(seen) for seen in exchange.images],
                "films": [
                    {
                        "name": film.name,
                        "times": film.times,
                        "frames": [*map(image_to_json, film.frames)],
                    }
                    for film in exchange.videos
                ],
                "answer": exchange.answer,
                "token_ids": exchange.token_ids,
                "complete": exchange.complete,
            }
            for exchange in talk.exchanges
        ],
    }


def json_value(value: Any) -> Any:
    """Write fractions as text, which is read back as the same step."""
    if isinstance(value, list | tuple):
        return [json_value(entry) for entry in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def image_to_json(seen: ProcessedImage) -> dict[str, Any]:
    return {"key": seen.content_hash.hex(), **asdict(seen.info)}


def images_by_hash(exchanges: list[Exchange]) -> dict[str, ProcessedImage]:
    return {
        seen.content_hash.hex(): seen
        for exchange in exchanges
        for seen in exchange.processed_images
    }


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def check_tiling(content: dict[str, Any], talk: "Conversation", path: Path) -> None:
    """Refuse a talk from a newer version, or whose pictures were cut for another model."""
    if content["version"] != FORMAT_VERSION:
        raise UserError(f"{path} was saved by a newer version of internvl3-mlx; update it")
    config = talk.vlm.config
    theirs = (content["tile_size"], content["tokens_per_tile"])
    if theirs != (config.force_image_size, config.num_image_token):
        raise UserError(
            f"{path} was held with {content['model']}, whose tiles are {theirs[0]} pixels wide "
            f"where this model's are {config.force_image_size}; load that model"
        )


def exchange_from_json(entry: dict[str, Any], file: zipfile.ZipFile) -> Exchange:
    def seen(shown: dict[str, Any]) -> ProcessedImage:
        tiles = np.load(BytesIO(file.read(f"{shown['key']}.npy")), allow_pickle=False)
        info = ImageInfo(**{name: value for name, value in shown.items() if name != "key"})
        picture = ProcessedImage(tiles, info)
        if picture.content_hash.hex() != shown["key"] or len(tiles) != info.tiles:
            raise ValueError("a picture is not the one that was saved")
        return picture

    def film(shown: dict[str, Any]) -> ProcessedVideo:
        times = None if shown["times"] is None else tuple(shown["times"])
        return ProcessedVideo(shown["name"], tuple(map(seen, shown["frames"])), times)

    return Exchange(
        question=str(entry["question"]),
        images=tuple(map(seen, entry["pictures"])),
        videos=tuple(map(film, entry["films"])),
        answer=str(entry["answer"]),
        token_ids=tuple(map(int, entry["token_ids"])),
        complete=bool(entry["complete"]),
    )
