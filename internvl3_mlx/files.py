"""Files shared by all packages: atomic writes, cache folders, name hints and digests.

``atomic_write`` and ``atomic_folder`` write beside the target under a hidden name that carries the
process id, flush to the disk, and rename. A reader sees the old content or the new, never a part,
whenever the process is killed or the power fails. What a killed process left is removed by the next
write to the same target.
"""

import errno
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from difflib import get_close_matches
from functools import partial
from hashlib import blake2b
from itertools import count
from pathlib import Path

from internvl3_mlx.durable import flush, flush_tree
from internvl3_mlx.errors import UserError, WriteError
from internvl3_mlx.user_paths import expand_user, home_folder
from internvl3_mlx.write_guards import (
    MODEL_FOLDER,
    FolderKind,
    check_replaceable_folder,
    is_locked,
    lock_folder,
    wait_for_lock,
)

CACHE_VARIABLE = "INTERNVL3_CACHE"
DATA_VARIABLE = "INTERNVL3_DATA"
CACHE_NAME = "internvl3-mlx"  # also of the data folder
DIGEST_BYTES = 16  # 128 bits: no two contents share a digest by accident
CHUNK_BYTES = 2**20
NEAREST_CUTOFF = 0.6  # difflib's own default
MLX_WRITE_FAILED = "Unable to write"  # how MLX reports a full disk, as a RuntimeError

PARTIAL_FILE = re.compile(r"\..+\.(\d+)-\d+\.part(\.[^.]*)?")  # group 1: the process id

OnWait = Callable[[str], None]  # called with one line before a wait

_serial = count()
_unfinished: set[Path] = set()  # what this process is writing now


def wait_silently(_: str) -> None:
    """Say nothing before a wait."""


@contextmanager
def atomic_write(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a path to write to; its file replaces ``path`` when the block ends without an error.

    The yielded name keeps the suffix of ``path``, and the file the permissions of the one it
    replaces. The folder must exist. Raises WriteError when the file cannot be written.

    durable: False for caches of many files that are checked when they are read: it neither waits
    for the disk nor searches the folder for leftovers (``remove_partial_files`` does that once).
    """
    path = Path(os.path.realpath(path))
    part = _temporary(path, "part", path.suffix)
    try:
        _refuse_other_kinds(path)
        if durable:
            _remove_leftovers(path)
        yield part
        with suppress(FileNotFoundError):
            os.chmod(part, stat.S_IMODE(path.stat().st_mode))
        if durable:
            flush(part)
        os.replace(part, path)
        if durable:
            flush(path.parent)
    except OSError as error:
        raise _write_error(path, error) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        _unfinished.discard(part)


@contextmanager
def atomic_folder(
    target: Path,
    *,
    overwrite: bool = False,
    replaceable: FolderKind = MODEL_FOLDER,
    on_wait: OnWait = wait_silently,
) -> Iterator[Path]:
    """Yield an empty folder to write into; it becomes ``target`` when the block ends without error.

    An existing ``target`` is refused, or with ``overwrite`` replaced at the very end, if it holds
    only files of that kind; a file is never replaced. A target that another process
    is writing is waited for; what that process wrote stays where this one writes the same.
    Raises WriteError.

    on_wait: called with one line before waiting.
    """
    target = Path(os.path.realpath(target))
    part = _temporary(target, "part")
    check = partial(check_unused, target, overwrite=overwrite, replaceable=replaceable)
    with ExitStack() as stack:
        stack.callback(_unfinished.discard, part)
        stack.callback(shutil.rmtree, part, ignore_errors=True)
        try:
            _make_folder(target.parent)
            waited = _begin_folder(target, part, check, stack, on_wait)
            yield part
            if waited and not overwrite and _same_files(part, target):
                return
            check()
            flush_tree(part)
            _swap_in(part, target)
        except OSError as error:
            raise _write_error(target, error) from error


@contextmanager
def atomic_files(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Yield an empty folder to write files into; those of ``names`` then replace ``folder``'s.

    Each is the old or the new one whenever the process is killed. Everything else in ``folder``
    stays as it is. Raises WriteError.
    """
    folder = Path(os.path.realpath(folder))
    target = folder / "files"  # only its hidden name is used
    part = _temporary(target, "part")
    try:
        _make_folder(folder)
        _remove_leftovers(target)
        part.mkdir()
        yield part
        flush_tree(part)
        for name in names:
            os.replace(part / name, folder / name)
        flush(folder)
    except OSError as error:
        raise _write_error(folder, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        _unfinished.discard(part)


def _begin_folder(
    target: Path, part: Path, check: Callable[[], None], stack: ExitStack, on_wait: OnWait
) -> bool:
    """Make ``part`` and lock it, once no other process writes ``target``; return whether one did.

    The system releases the lock when the process ends, however it ends.
    """
    waited = False
    while True:
        with lock_folder(target.parent):  # of two processes at once, one is first
            recover_folder(target)
            if not waited:
                check()
            writer = _find_writer(target)
            if writer is None:
                part.mkdir()
                stack.enter_context(lock_folder(part))
                return waited
        if not waited:
            on_wait(f"another process is writing {target}; waiting for it")
        waited = True
        wait_for_lock(writer)


def _same_files(folder: Path, other: Path) -> bool:
    """Return whether two folders hold the same files with the same content."""

    def contents(root: Path) -> dict[str, str]:
        files = (path for path in root.rglob("*") if path.is_file())
        return {str(path.relative_to(root)): content_digest(path) for path in files}

    return other.is_dir() and contents(folder) == contents(other)


def recover_folder(target: Path) -> None:
    """Undo what a killed ``atomic_folder`` left: put the old folder back, remove everything else.

    Between its two renames ``target`` has no name of its own; whoever opens a folder that
    ``atomic_folder`` writes can call this first.
    """
    target = Path(os.path.realpath(target))
    for replaced in _leftovers(target, "old"):
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.rename(replaced, target)
    _remove_leftovers(target)


def remove_partial_files(folder: Path) -> None:
    """Remove what killed processes left of any ``atomic_write`` in ``folder``."""
    for path in _find_leftovers(folder, PARTIAL_FILE):
        with suppress(OSError):
            path.unlink()


def check_unused(
    target: Path, *, overwrite: bool = False, replaceable: FolderKind = MODEL_FOLDER
) -> None:
    """Raise WriteError if ``target`` exists and may not be replaced."""
    if target.is_dir() and not overwrite:
        raise WriteError(f"{target} exists; name another folder, or pass --overwrite")
    if target.is_dir():
        check_replaceable_folder(target, replaceable)
    if target.exists() and not target.is_dir():
        raise WriteError(f"{target} exists; name another folder")


def cache_folder(name: str = "") -> Path:
    """Return folder ``name`` of $INTERNVL3_CACHE, or of the user's cache. It may not exist."""
    if configured := os.environ.get(CACHE_VARIABLE):
        return expand_user(configured) / name
    base = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return (base if base.is_absolute() else home_folder() / ".cache") / CACHE_NAME / name


def data_folder(name: str = "") -> Path:
    """Return folder ``name`` of $INTERNVL3_DATA, or of the user's data. It may not exist."""
    if configured := os.environ.get(DATA_VARIABLE):
        return expand_user(configured) / name
    base = Path(os.environ.get("XDG_DATA_HOME") or "")
    return (base if base.is_absolute() else home_folder() / ".local" / "share") / CACHE_NAME / name


def check_keys(found: Iterable[object], known: Iterable[str], where: str) -> None:
    """Raise UserError for the first key that is not known, with the nearest one that is."""
    names = list(known)
    for key in found:
        if key not in names:
            raise UserError(f"{where}: unknown key {key!r}; {did_you_mean(str(key), names)}")


def did_you_mean(
    name: str,
    known: Iterable[str],
    *,
    otherwise: str | None = None,
    limit: int = 1,
    cutoff: float = NEAREST_CUTOFF,
) -> str:
    """Return a hint for a misspelled name: the nearest known ones, or a list of all.

    otherwise: the hint where nothing is near, in place of the list.
    """
    names = [str(entry) for entry in known]
    if near := nearest_names(name, names, limit=limit, cutoff=cutoff):
        *others, last = near
        return f"did you mean {', '.join(others)} or {last}?" if others else f"did you mean {last}?"
    return f"choose from {', '.join(names)}" if otherwise is None else otherwise


def nearest_names(
    name: str, known: Iterable[str], *, limit: int = 1, cutoff: float = NEAREST_CUTOFF
) -> list[str]:
    """Return the known names most like ``name``, the nearest first."""
    return get_close_matches(name, [*known], n=limit, cutoff=cutoff)


def content_digest(*parts: str | bytes | memoryview | Path, size: int = DIGEST_BYTES) -> str:
    """Return a hexadecimal BLAKE2b digest of ``size`` bytes; a path stands for its file's content.

    Each part's length is part of the digest, so ("ab", "c") and ("a", "bc") differ.
    """
    summary = blake2b(digest_size=size)
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as stream:
                summary.update(os.fstat(stream.fileno()).st_size.to_bytes(8, "little"))
                while chunk := stream.read(CHUNK_BYTES):
                    summary.update(chunk)
            continue
        data = memoryview(part.encode() if isinstance(part, str) else part).cast("B")
        summary.update(data.nbytes.to_bytes(8, "little"))
        summary.update(data)
    return summary.hexdigest()


def is_disk_full(fault: BaseException | None) -> bool:
    """Return whether a full disk is the cause of an error, MLX's among them."""
    if isinstance(fault, OSError):
        return fault.errno in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(fault, WriteError):
        return is_disk_full(fault.__cause__)
    return isinstance(fault, RuntimeError) and MLX_WRITE_FAILED in str(fault)


def is_running(pid: int) -> bool:
    """Return whether a process with this id exists."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _make_folder(folder: Path) -> None:
    """Make a folder and its parents; a file in its place is named for what it is."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error


def _temporary(target: Path, kind: str, suffix: str = "") -> Path:
    path = target.with_name(f".{target.name}.{os.getpid()}-{next(_serial)}.{kind}{suffix}")
    _unfinished.add(path)
    return path


def _leftovers(target: Path, kind: str) -> list[Path]:
    """List what processes that are gone left beside ``target``.

    In a container each run may get the same id: a name with our own id that we are not writing is
    an earlier process's.
    """
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(\d+)-\d+\.{kind}(\.[^.]*)?")
    return _find_leftovers(target.parent, pattern)


def _find_writer(target: Path) -> Path | None:
    """Return the folder that another process fills to become ``target``, if one does.

    Raises WriteError where this process itself does: it would wait for itself.
    """
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(\d+)-\d+\.part")
    for path in sorted(target.parent.iterdir()):
        if pattern.fullmatch(path.name) and is_locked(path):
            if path in _unfinished:
                raise WriteError(f"{target} is being written already; name another folder")
            return path
    return None


def _find_leftovers(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    if not folder.is_dir():
        return []
    found = []
    for path in sorted(folder.iterdir()):
        match = pattern.fullmatch(path.name)
        if match and path not in _unfinished:
            pid = int(match[1])
            gone = pid == os.getpid() or not is_running(pid)
            if gone and not (path.is_dir() and is_locked(path)):  # by a process in a container
                found.append(path)
    return found


def _remove_leftovers(target: Path) -> None:
    for path in _leftovers(target, "part"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def _swap_in(part: Path, target: Path) -> None:
    """Rename ``part`` to ``target``; a folder in its place is removed only afterwards."""
    if not target.exists():
        os.rename(part, target)
        flush(target.parent)
        return
    replaced = _temporary(target, "old")
    try:
        os.rename(target, replaced)
        try:
            os.rename(part, target)
        except OSError:
            os.rename(replaced, target)
            raise
        flush(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        _unfinished.discard(replaced)


def _refuse_other_kinds(path: Path) -> None:
    if path.is_dir():
        raise WriteError(f"{path} is a folder; name a file")
    if path.exists() and not path.is_file():
        raise WriteError(f"{path} is not a regular file; name another file")


def _write_error(path: Path, error: OSError) -> WriteError:
    return WriteError(
        f"cannot write {path}: {error.strerror or error}; nothing was left behind, "
        "check the path and the free disk space"
    )
