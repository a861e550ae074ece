"""Read the archive of a saved conversation, which may come from a stranger, within bounds.

Every entry's size is known from its header before it is read, and every value has its type and
range checked before anything is replaced.
"""

import json
import math
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar
from zlib import error as ZlibError

import numpy as np
from numpy.typing import NDArray

from internvl3_mlx.generation.exchange import Exchange
from internvl3_mlx.generation.processor import ImageInfo, ProcessedImage, ProcessedVideo
from internvl3_mlx.prompt.v2pe import parse_delta

CONVERSATION_ENTRY = "conversation.json"
MAX_JSON_BYTES = 64 * 2**20
MAX_TILES = 4096  # of all images and frames: 2.4 GB at 448 pixels, more than any context holds
MAX_PIXELS = 2**31  # of one side, as the image library allows
NPY_HEADER_BYTES = 128  # what NumPy writes before an array of four dimensions
READ_ERRORS = (
    OSError, zipfile.BadZipFile, ZlibError, ValueError, KeyError, TypeError, EOFError,
    RecursionError, RuntimeError, NotImplementedError, MemoryError, OverflowError, AttributeError,
)  # fmt: skip
# the options a conversation saves, and what each may be beside None
OPTION_TYPES: Mapping[str, type] = {
    "system": str, "ntk": bool, "max_tiles": int, "min_tiles": int, "thumbnail": bool,
    "upright": bool,
}  # fmt: skip
REQUIRED_OPTIONS = ("ntk", "upright")  # never None

T = TypeVar("T")


class ConversationArchive:
    """An open archive. Its methods raise one of ``READ_ERRORS`` for anything damaged.

    vocab_size: ids of answers must be below it; None drops the ids.
    tokens_per_tile, tile_size: the model's.
    """

    def __init__(
        self, file: zipfile.ZipFile, *, vocab_size: int | None, tokens_per_tile: int, tile_size: int
    ):
        self.file = file
        self.vocab_size = vocab_size
        self.tokens_per_tile = tokens_per_tile
        self.tile_size = tile_size
        self.images: dict[str, NDArray[np.uint8]] = {}  # the tiles read so far, by their hash

    def exchange(self, saved: object) -> Exchange:
        """Restore one exchange."""
        entry = checked(saved, dict)
        ids = tuple(checked(number, int) for number in checked(entry["token_ids"], list))
        if self.vocab_size is None:
            ids = ()
        elif not all(0 <= number < self.vocab_size for number in ids):
            raise ValueError("a token id outside the vocabulary")
        return Exchange(
            question=text(entry["question"]),
            images=tuple(map(self.image, checked(entry["images"], list))),
            videos=tuple(map(self.video, checked(entry["videos"], list))),
            answer=text(entry["answer"]),
            token_ids=ids,
            complete=checked(entry["complete"], bool),
        )

    def video(self, saved: object) -> ProcessedVideo:
        entry = checked(saved, dict)
        frames = tuple(map(self.image, checked(entry["frames"], list)))
        if entry["times"] is None:
            return ProcessedVideo(text(entry["name"]), frames, None)
        times = tuple(float(time) for time in checked(entry["times"], list))
        if len(times) != len(frames) or not all(math.isfinite(t) and t >= 0 for t in times):
            raise ValueError("the times of a video are not those of its frames")
        return ProcessedVideo(text(entry["name"]), frames, times)

    def image(self, saved: object) -> ProcessedImage:
        """Restore an image; raise ValueError where it is not the one that was saved."""
        entry = checked(saved, dict)
        width, height, tiles, tokens = (
            checked(entry[name], int) for name in ("width", "height", "tiles", "tokens")
        )
        if not (0 < width < MAX_PIXELS and 0 < height < MAX_PIXELS):
            raise ValueError("an image has an impossible size")
        if tiles < 1 or tokens != tiles * self.tokens_per_tile:
            raise ValueError("the tiles and tokens of an image do not agree")
        name = text(entry["hash"])
        if name not in self.images:
            self.images[name] = self.read_tiles(f"{name}.npy", tiles)
        info = ImageInfo(text(entry["source"]), width, height, tiles, tokens)
        restored = ProcessedImage(self.images[name], info)
        if restored.content_hash.hex() != name or len(restored.tiles) != tiles:
            raise ValueError("an image is not the one that was saved")
        return restored

    def read_tiles(self, name: str, tiles: int) -> NDArray[np.uint8]:
        """Read tiles (T, S, S, 3); the header decides whether the rest is read at all."""
        if tiles + sum(map(len, self.images.values())) > MAX_TILES:
            raise ValueError(f"more than {MAX_TILES} tiles")
        shape = (tiles, self.tile_size, self.tile_size, 3)
        data = read_entry(self.file, name, math.prod(shape) + NPY_HEADER_BYTES)
        stream = BytesIO(data)
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("tiles in an unknown format")
        found, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
        if found != shape or fortran_order or dtype != np.uint8:
            raise ValueError(f"tiles of shape {found} and type {dtype}")
        return np.frombuffer(data, np.uint8, offset=stream.tell()).reshape(shape)


def read_content(file: zipfile.ZipFile) -> dict[str, Any]:
    """Read the entry that holds everything but the tiles."""
    content = json.loads(read_entry(file, CONVERSATION_ENTRY, MAX_JSON_BYTES))
    return checked(content, dict)


def read_entry(file: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """Read one entry of at most ``limit`` bytes, whatever its header says."""
    info = file.getinfo(name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed in a way that we never write")
    if info.file_size > limit:
        raise ValueError(f"{name} holds {info.file_size} bytes, more than {limit}")
    with file.open(info) as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{name} is longer than its header says")
    return data


def is_conversation_file(path: Path) -> bool:
    """Return whether ``path`` is a conversation that we saved, whole or damaged within."""
    try:
        with zipfile.ZipFile(path) as file:
            return CONVERSATION_ENTRY in file.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError):
        return False


def checked_options(saved: object) -> dict[str, Any]:
    """Check the saved options one by one; raise ValueError or TypeError for a wrong value."""
    entry = checked(saved, dict)
    options: dict[str, Any] = {}
    for name, kind in OPTION_TYPES.items():
        value = entry[name]
        if value is not None or name in REQUIRED_OPTIONS:
            value = text(value) if kind is str else checked(value, kind)
        options[name] = value
    delta = entry["v2pe_delta"]
    for step in delta if isinstance(delta, list) else [delta]:
        parse_delta(step)
    return {**options, "v2pe_delta": delta}


def checked(value: object, kind: type[T]) -> T:
    """Return ``value`` if it is of exactly this kind: True is not a number here."""
    if type(value) is not kind:
        raise TypeError(f"{type(value).__name__} where {kind.__name__} was expected")
    return value


def text(value: object) -> str:
    """Return a string that can be encoded: lone surrogates have no place in UTF-8."""
    found = checked(value, str)
    found.encode("utf-8")
    return found
