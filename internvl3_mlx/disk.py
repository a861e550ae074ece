"""Free space, and our cache folder, marked as one that backups may leave out."""

import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from internvl3_mlx.files import cache_folder

GB, MB = 1_000_000_000, 1_000_000
PURGEABLE = " (without what macOS could purge)"  # the Finder counts it as free
TAG_FILE = "CACHEDIR.TAG"
# the signature is that of bford.info/cachedir, which backup programs look for
TAG = """Signature: 8a477f597d28d172789f06886806bc55
# This folder is a cache of internvl3-mlx. Everything in it can be made again.
# It needs no backup; see https://bford.info/cachedir/
"""


@dataclass(frozen=True)
class FreeSpace:
    """The free bytes of the disk that holds ``place``."""

    nbytes: int
    place: Path

    def __str__(self) -> str:
        return f"{format_bytes(self.nbytes)} are free in {self.place}{purgeable_note()}"


@dataclass(frozen=True)
class Shortage:
    """A disk without room for ``needed`` bytes: ``51.0 GB of disk space, but only ...``."""

    needed: int
    free: FreeSpace

    def __str__(self) -> str:
        return f"{format_bytes(self.needed)} of disk space, but only {self.free}"


def find_shortage(needs: Iterable[tuple[Path, float]]) -> Shortage | None:
    """Return the first disk that has no room for what is to be written; None if all fits.

    needs: folders, which need not exist, with bytes; those on the same disk are added.
    """
    totals = dict[int, float]()
    spaces = dict[int, FreeSpace]()
    for folder, nbytes in needs:
        free = find_free_space(folder)
        disk = free.place.stat().st_dev
        totals[disk] = totals.get(disk, 0) + nbytes
        spaces.setdefault(disk, free)
    full = (disk for disk, total in totals.items() if total > spaces[disk].nbytes)
    return next((Shortage(round(totals[disk]), spaces[disk]) for disk in full), None)


def format_bytes(count: float) -> str:
    """Format a number of bytes: ``3.4 MB``."""
    return f"{count / GB:,.1f} GB" if count >= GB / 2 else f"{count / MB:,.1f} MB"


def purgeable_note() -> str:
    """Return what to add to a number of free bytes, on the system that counts otherwise."""
    return PURGEABLE if sys.platform == "darwin" else ""


def find_free_space(path: Path) -> FreeSpace:
    """Return the free space of the disk where ``path``, which need not exist, would be."""
    place = next(p for p in (path, *path.absolute().parents) if p.exists())
    return FreeSpace(shutil.disk_usage(place).free, place)


def make_cache_folder(name: str = "") -> Path:
    """Make folder ``name`` of our cache and return it; the cache itself gets a tag for backups.

    Where nothing can be written, the path is returned all the same: whoever writes there says so.
    """
    folder, tag = cache_folder(name), cache_folder() / TAG_FILE
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if not tag.exists():
            tag.write_text(TAG, "utf-8")
    return folder
