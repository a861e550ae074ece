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
from internvl3_mlx.generation.engine import packing_of
from internvl3_mlx.generation.exchange import Exchange
from internvl3_mlx.generation.generation_config import changed
from internvl3_mlx.generation.processor import Film, ImageInfo, Seen
from internvl3_mlx.generation.prompt_cache_file import fingerprint, read_prefix, write_prefix

if TYPE_CHECKING:
    from internvl3_mlx.generation.conversation import Conversation

VERSION = 1
TALK = "talk.json"
CACHE_SUFFIX = ".safetensors"
# what shapes the prompt goes along; how answers are sampled belongs to the listener
SAVED = ("system", "v2pe_delta", "ntk", "max_tiles", "min_tiles", "thumbnail", "upright")
DAMAGE = (OSError, zipfile.BadZipFile, ZlibError, ValueError, KeyError, TypeError, EOFError)


def save_talk(talk: "Conversation", path: Path, *, cache: bool) -> None:
    """Write the talk to ``path``; with ``cache`` its keys and values to ``path.safetensors``."""
    try:
        if cache:  # first: a talk without its cache is whole, a cache without its talk is not
            with replacing(cache_path(path)) as part:
                write_prefix(part, talk.memory, fingerprint(talk.vlm.model))
        with replacing(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr(TALK, json.dumps(described(talk), ensure_ascii=False))
            for key, seen in pictures_of(talk.exchanges).items():
                file.writestr(f"{key}.npy", as_npy(seen.tiles))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; try elsewhere") from error


def load_talk(talk: "Conversation", path: Path) -> bool:
    """Put the saved talk into ``talk``, all or nothing; tell whether its cache could be used."""
    try:
        with zipfile.ZipFile(path) as file:
            content = json.loads(file.read(TALK))
            check_fits(content, talk, path)
            exchanges = [restored(entry, file) for entry in content["exchanges"]]
            settings = {name: content["settings"][name] for name in SAVED}
            same_model = content["fingerprint"] == fingerprint(talk.vlm.model)
    except FileNotFoundError as error:
        raise UserError(f"no file at {path}; check the path") from error
    except DAMAGE as error:
        raise UserError(f"cannot read {path}: it is no saved talk, or damaged") from error
    if not same_model:  # another vocabulary, perhaps: its words are read, not its ids
        exchanges = [entry.as_text() for entry in exchanges]
    talk.settings = changed(talk.settings, settings)
    talk.exchanges = exchanges
    read = same_model and read_prefix(cache_path(path), talk.memory, content["fingerprint"])
    return read and talk.memory.fits(packing_of(talk.settings, talk.vlm.config.text.head_dim))


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


def described(talk: "Conversation") -> dict[str, Any]:
    """Put a talk into plain values; pictures are named by their content."""
    config = talk.vlm.config
    return {
        "version": VERSION,
        "model": talk.vlm.name,
        "fingerprint": fingerprint(talk.vlm.model),
        "tile_size": config.force_image_size,
        "tokens_per_tile": config.num_image_token,
        "settings": {name: plain(getattr(talk.settings, name)) for name in SAVED},
        "exchanges": [
            {
                "question": exchange.question,
                "pictures": [named(seen) for seen in exchange.pictures],
                "films": [
                    {"name": film.name, "times": film.times, "frames": [*map(named, film.frames)]}
                    for film in exchange.films
                ],
                "answer": exchange.answer,
                "token_ids": exchange.token_ids,
                "complete": exchange.complete,
            }
            for exchange in talk.exchanges
        ],
    }


def plain(value: Any) -> Any:
    """Write fractions as text, which is read back as the same step."""
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def named(seen: Seen) -> dict[str, Any]:
    return {"key": seen.key.hex(), **asdict(seen.info)}


def pictures_of(exchanges: list[Exchange]) -> dict[str, Seen]:
    return {seen.key.hex(): seen for exchange in exchanges for seen in exchange.seen}


def as_npy(array: np.ndarray) -> bytes:
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def check_fits(content: dict[str, Any], talk: "Conversation", path: Path) -> None:
    """Refuse a talk from a newer version, or whose pictures were cut for another model."""
    if content["version"] != VERSION:
        raise UserError(f"{path} was saved by a newer version of internvl3-mlx; update it")
    config = talk.vlm.config
    theirs = (content["tile_size"], content["tokens_per_tile"])
    if theirs != (config.force_image_size, config.num_image_token):
        raise UserError(
            f"{path} was held with {content['model']}, whose tiles are {theirs[0]} pixels wide "
            f"where this model's are {config.force_image_size}; load that model"
        )


def restored(entry: dict[str, Any], file: zipfile.ZipFile) -> Exchange:
    def seen(shown: dict[str, Any]) -> Seen:
        tiles = np.load(BytesIO(file.read(f"{shown['key']}.npy")), allow_pickle=False)
        info = ImageInfo(**{name: value for name, value in shown.items() if name != "key"})
        picture = Seen(tiles, info)
        if picture.key.hex() != shown["key"] or len(tiles) != info.tiles:
            raise ValueError("a picture is not the one that was saved")
        return picture

    def film(shown: dict[str, Any]) -> Film:
        times = None if shown["times"] is None else tuple(shown["times"])
        return Film(shown["name"], tuple(map(seen, shown["frames"])), times)

    return Exchange(
        question=str(entry["question"]),
        pictures=tuple(map(seen, entry["pictures"])),
        films=tuple(map(film, entry["films"])),
        answer=str(entry["answer"]),
        token_ids=tuple(map(int, entry["token_ids"])),
        complete=bool(entry["complete"]),
    )
