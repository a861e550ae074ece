"""Decode the images and videos of records before a run, each content once ever.

Contents that were decoded are remembered in the cache by their digest, so that a second check of
the same files only reads them. Damaged ones are not remembered.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

from internvl3_mlx.errors import UserError, WriteError
from internvl3_mlx.files import atomic_write, cache_folder, content_digest
from internvl3_mlx.images.frame_folder import find_frame_folder, list_frames
from internvl3_mlx.records.json_values import RecordError
from internvl3_mlx.training.data.media import (
    MediaLoader,
    resolve_media_path,
    resolve_video_path,
)
from internvl3_mlx.training.data.record_files import DataFile
from internvl3_mlx.training.data.schema import ParsedRecord

CHECKED_FOLDER, CHECKED_FILE = "checked-media", "digests-1"  # the number: of what is hashed
DIGEST_BYTES = 16
WORKERS = 4  # decoding releases Python's lock; more threads would only hold more images
WINDOW = 8 * WORKERS  # records that are being checked at once

T = TypeVar("T")
R = TypeVar("R")


class DecodeCheck:
    """Decodes media and remembers which contents were fine. num_decoded: by this process."""

    def __init__(self, loader: MediaLoader, folder: Path | None = None) -> None:
        self.loader = loader
        self.path = (folder or cache_folder(CHECKED_FOLDER)) / CHECKED_FILE
        self.lock = threading.Lock()
        self.known = read_digests(self.path)
        self.num_media = self.num_decoded = 0

    def check(self, record: ParsedRecord, file: DataFile) -> None:
        """Decode the media of a record unless their contents are known to be fine.

        Raises ``RecordError`` that names the damaged files.
        """
        digests = {self.digest(record, file)} if record.images or record.videos else set[bytes]()
        with self.lock:
            self.num_media += len(record.images) + len(record.videos)
            unknown = digests - self.known
        if not unknown:
            return
        self.loader.decode(record, file)
        with self.lock:
            self.known |= unknown
            self.num_decoded += len(record.images) + len(record.videos)

    def digest(self, record: ParsedRecord, file: DataFile) -> bytes:
        """Return a digest of all media of a record, and of what is read of them."""
        frames = f"{self.loader.config.num_frames} {record.clip}" if record.videos else ""
        parts: list[str | bytes | Path] = [frames]
        named = [(resolve_media_path, name) for name in record.images]
        named += [(resolve_video_path, name) for name in record.videos]
        for resolve, name in named:
            try:
                source = resolve(name, file)
                folder = find_frame_folder(source)
                paths = [source] if folder is None else list_frames(folder)
                parts += [content_digest(p) if isinstance(p, Path) else p for p in paths]
            except (UserError, OSError) as error:
                raise RecordError(str(error)) from error
        return bytes.fromhex(content_digest(*parts))

    def save(self) -> None:
        """Remember what was found; a cache that cannot be written costs only time."""
        with suppress(WriteError, OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            known = sorted(self.known | read_digests(self.path))
            with atomic_write(self.path) as temporary:
                temporary.write_bytes(checksum(b"".join(known)) + b"".join(known))


def read_digests(path: Path) -> set[bytes]:
    """Read the remembered digests; a missing or damaged file counts as empty."""
    try:
        content = path.read_bytes()
    except OSError:
        return set()
    found = content[DIGEST_BYTES:]
    if len(found) % DIGEST_BYTES or content[:DIGEST_BYTES] != checksum(found):
        return set()
    return {found[i : i + DIGEST_BYTES] for i in range(0, len(found), DIGEST_BYTES)}


def checksum(content: bytes) -> bytes:
    return blake2b(content, digest_size=DIGEST_BYTES).digest()


def map_in_order(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Apply a function in threads; yield the results in order, a bounded number ahead."""
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= WINDOW:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
