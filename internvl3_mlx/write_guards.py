"""What a write may replace: only what is recognizably of the same kind and ours.

A folder is replaced only when every file in it is one that a model or an adapter consists of. The
home folder, the current one and their parents, mount points and git work trees never are. A lock
makes a second process wait until the first one is done.
"""

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from internvl3_mlx.errors import WriteError

# Files of a model or an adapter. A pattern such as *.json would match a user's own data.
MODEL_FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
    "chat_template.json", "chat_template.jinja", "model.safetensors", "model-*-of-*.safetensors",
    "model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors",
    "examples_training.json", "configuration_*.py", "modeling_*.py", "processing_*.py",
    "tokenization_*.py", "image_processing_*.py", "video_processing_*.py", "conversation.py",
    "README.md", "LICENSE*", "NOTICE*",
)  # fmt: skip


@dataclass(frozen=True)
class FolderKind:
    """What a folder of one kind consists of, by patterns of file names.

    files: what it may hold. complete: sets of files, one of which must be there.
    """

    name: str
    files: tuple[str, ...]
    complete: tuple[tuple[str, ...], ...]


# a folder that only holds a README is not a model
MODEL_FOLDER = FolderKind(
    "a model",
    MODEL_FILES,
    (("config.json", "model*.safetensors"), ("adapter_config.json", "adapter_model.safetensors")),
)
SYSTEM_FILES = (".DS_Store", "._*", ".localized", ".gitattributes", "CACHEDIR.TAG")
SHOWN_NAMES = 3


def check_replaceable_folder(folder: Path, kind: FolderKind = MODEL_FOLDER) -> None:
    """Raise WriteError unless ``folder`` is empty or is of the ``kind`` and holds nothing else.

    Folders inside are never replaced.
    """
    place = Path(os.path.realpath(folder))
    if why := _protected(place):
        raise WriteError(f"{folder} is {why}, which is never replaced; name another folder")
    entries = [e for e in sorted(os.scandir(place), key=lambda e: e.name) if not _is_system(e.name)]
    in_the_way = [
        f"{entry.name}/" if entry.is_dir() else entry.name
        for entry in entries
        if entry.is_dir() or not _matches(entry.name, kind.files)
    ]
    if in_the_way:
        more = len(in_the_way) - SHOWN_NAMES
        listed = ", ".join(in_the_way[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
        raise WriteError(
            f"{folder} holds files that are not part of {kind.name}: {listed}; "
            "move them away, or name another folder"
        )
    names = [entry.name for entry in entries]
    if names and not any(_has(names, patterns) for patterns in kind.complete):
        raise WriteError(
            f"{folder} holds {names[0]} but not the whole of {kind.name}; "
            "remove it yourself, or name another folder"
        )


def check_replaceable_file(path: Path, is_ours: Callable[[Path], bool], kind: str) -> None:
    """Raise WriteError if ``path`` exists, is not empty and is not a file of our own ``kind``.

    is_ours: says whether an existing regular file is of that kind; it may raise OSError.
    """
    try:
        if not path.is_file() or path.stat().st_size == 0 or is_ours(path):
            return
    except OSError as error:
        raise WriteError(f"cannot read {path}: {error.strerror}; name another file") from error
    raise WriteError(f"{path} exists and is not {kind}; name another file")


def contains(folder: Path, path: Path) -> bool:
    """Return whether ``path``, which need not exist, is ``folder`` or lies in it.

    The file system is asked, since a Mac's takes a name in upper or lower case and in two Unicode
    forms for the same one.
    """
    try:
        wanted = os.stat(folder)
    except OSError:
        return False
    place = Path(os.path.realpath(path))
    for candidate in (place, *place.parents):
        with suppress(OSError):
            if os.path.samestat(os.stat(candidate), wanted):
                return True
    return False


def starts_with(path: Path, *beginnings: bytes) -> bool:
    """Return whether the file begins with one of ``beginnings``."""
    with path.open("rb") as stream:
        return stream.read(max(map(len, beginnings))).startswith(beginnings)


@contextmanager
def hold_lock(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file ``path`` during the block; call ``on_wait`` once before waiting for it.

    The system releases the lock when its process ends, however it ends. Where locks are not
    supported, as on some network disks, the block runs without one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _open_locked(path, on_wait)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # still locked: whoever waits for this file notices that it is gone
        os.close(descriptor)


def _open_locked(path: Path, on_wait: Callable[[], None]) -> int:
    """Open and lock the file that has the name ``path`` once it is locked."""
    waited = False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not waited:
                on_wait()
            waited = True
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            return descriptor
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock an existing folder itself during the block, without a file in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def wait_for_lock(folder: Path) -> None:
    """Wait until nobody holds ``lock_folder``; at once where the folder is gone."""
    with suppress(FileNotFoundError), lock_folder(folder):
        pass


def is_locked(folder: Path) -> bool:
    """Return whether another process, or another part of this one, holds ``lock_folder``."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _protected(place: Path) -> str:
    """Say what a folder is that must never be replaced; "" for any other."""
    with suppress(RuntimeError):  # no home folder
        home = Path(os.path.realpath(Path.home()))
        if contains(place, home):
            return "your home folder or a parent of it"
    with suppress(OSError):  # the current folder was removed
        here = Path(os.path.realpath(Path.cwd()))
        if contains(place, here):
            return "the current folder or a parent of it"
    if os.path.ismount(place):
        return "a mount point"
    return "a git work tree" if (place / ".git").exists() else ""


def _is_system(name: str) -> bool:
    return _matches(name, SYSTEM_FILES)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _has(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return all(any(fnmatch(name, pattern) for name in names) for pattern in patterns)
