"""Get the bytes of what the user names: a path, a URL, a data URI or standard input."""

import binascii
import io
import os
import re
import stat
import sys
import unicodedata
from base64 import b64decode
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from internvl3_mlx.errors import ImageError
from internvl3_mlx.files import nearest_names
from internvl3_mlx.images.download import DownloadRefused, DownloadTooLarge, download

MAX_BYTES = 100 * 2**20  # of one download, data URI or pipe
MAX_NAME_LENGTH = 200  # characters of a name in a message
NEAR_FILE = 0.7  # how alike two file names are, between 0 and 1
MAX_PATH_LENGTH = 1024  # characters; PATH_MAX of macOS
STDIN = "-"
APPLE_DOUBLE = "._"  # macOS writes these beside every file on exFAT and network disks
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
OPEN_PIPE = re.compile(r"/(dev|proc/(self|\d+))/fd/\d+")  # what a shell makes of <(command)
LOCAL_HOSTS = ("", "localhost")
SECRET_PARTS = re.compile(r"(?<=://)[^/?#]*@|[?#].*", re.DOTALL)
URL_PATTERN = re.compile(r"(?i)(data):|([a-z][a-z0-9+.-]+)://")


@dataclass(frozen=True)
class ImageBytes:
    """Bytes on disk or in memory. ``name``: what the user gave, shortened for messages."""

    name: str
    source: Path | bytes

    def open(self) -> BinaryIO:
        """Open the bytes for reading, from the start and seekable."""
        if isinstance(self.source, bytes):
            return io.BytesIO(self.source)
        try:
            return open_regular(self.source, self.name)
        except OSError as error:
            raise ImageError(
                f"cannot read {self.name}: {error.strerror}; check the file"
            ) from error


def locate(source: str | Path | bytes) -> ImageBytes:
    """Find what ``source`` names; download it if it is a URL. A Path is never taken for a URL.

    Raises ImageError.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return ImageBytes("image bytes", bytes(source))
    if isinstance(source, Path):
        return _from_path(str(source))
    if not isinstance(source, str):
        raise ImageError(
            f"cannot read an image from {type(source).__name__}; "
            "pass a path, a URL, bytes or a PIL image"
        )
    if source == STDIN:
        return _from_stdin()
    address = URL_PATTERN.match(source)
    return _from_address(source, address) if address else _from_path(source)


def shorten_name(name: str) -> str:
    """Shorten a name for messages: escape control characters, omit the middle of a long one."""
    name = CONTROLS.sub(lambda found: ascii(found[0])[1:-1], name)
    half = MAX_NAME_LENGTH // 2
    return name if len(name) <= MAX_NAME_LENGTH else f"{name[:half]}…{name[-half:]}"


def _from_stdin() -> ImageBytes:
    """Read the bytes that are piped in."""
    name, pipe = "standard input", sys.stdin.buffer
    if pipe.isatty():
        raise ImageError("cannot read an image from standard input: pipe one in, or give its path")
    return ImageBytes(name, _limited(pipe, name))


def _limited(pipe: BinaryIO, name: str) -> bytes:
    """Read a pipe to its end; raise ImageError beyond ``MAX_BYTES``."""
    data = pipe.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise too_large_error(name)
    return data


def too_large_error(name: str) -> ImageError:
    """Make the error for more than ``MAX_BYTES``."""
    return ImageError(
        f"cannot read {name}: larger than {MAX_BYTES // 2**20} MB; save it and give its path"
    )


def _from_address(text: str, address: re.Match[str]) -> ImageBytes:
    scheme = (address[1] or address[2]).lower()
    if scheme not in SCHEMES:
        raise ImageError(
            f"cannot read {shorten_name(text)}: {scheme} URLs are not supported; "
            "use http, https, file or data, or save the image and give its path"
        )
    try:
        return SCHEMES[scheme](text)
    except ValueError as error:  # what urllib raises for an invalid URL
        name = shorten_name(without_secrets(text))
        raise ImageError(f"cannot read {name}: the URL is not valid; check it") from error


def _from_web(text: str) -> ImageBytes:
    name = shorten_name(without_secrets(text))
    return ImageBytes(name, download_image(text, name))


def _from_file_address(text: str) -> ImageBytes:
    parts = urlsplit(text)
    if parts.netloc.lower() not in LOCAL_HOSTS:
        raise ImageError(
            f"cannot read {shorten_name(text)}: the file is on another computer ({parts.netloc}); "
            "copy it here and give its path"
        )
    return _from_path(unquote(parts.path))


def _from_data(text: str) -> ImageBytes:
    head, comma, payload = text.partition(",")
    media, *options = head[len("data:") :].split(";")
    name = shorten_name(f"data:{media or 'image'}")
    if not comma:
        raise ImageError(f"cannot read {name}: a data URI needs a comma before its data; check it")
    if len(payload) > 2 * MAX_BYTES:
        raise too_large_error(name)
    data = unquote_to_bytes(payload)
    if "base64" in (option.strip().lower() for option in options):
        data = _from_base64(data, name)
    return ImageBytes(name, data)


def _from_base64(data: bytes, name: str) -> bytes:
    """Decode base64 in the plain or URL-safe alphabet, with or without line breaks and padding."""
    data = b"".join(data.split()).rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
    try:
        return b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except binascii.Error as error:
        raise ImageError(
            f"cannot read {name}: its data is not valid base64; encode the file again"
        ) from error


SCHEMES: dict[str, Callable[[str], ImageBytes]] = {
    "http": _from_web,
    "https": _from_web,
    "file": _from_file_address,
    "data": _from_data,
}


def _from_path(text: str) -> ImageBytes:
    """Find a file: the exact path, then with ``~`` expanded, then by a name that looks the same."""
    name = shorten_name(text)
    path = _existing(text)
    if path is None:
        raise ImageError(f"no file at {name or 'an empty path'}: {_hint(text)}")
    if path.is_dir():
        raise ImageError(f"cannot read {name}: it is a folder; name an image in it")
    if path.name.startswith(APPLE_DOUBLE):
        raise ImageError(
            f"cannot read {name}: macOS keeps a file's attributes in it; "
            f"name {shorten_name(path.name.removeprefix(APPLE_DOUBLE))} instead"
        )
    if path.is_file():
        return ImageBytes(name, path)
    if path.is_fifo() and OPEN_PIPE.fullmatch(text):
        with path.open("rb") as pipe:
            return ImageBytes(name, _limited(pipe, name))
    raise not_regular_error(name)


def open_regular(path: Path, name: str) -> BinaryIO:
    """Open a regular file; what took its place meanwhile, such as a pipe, is not waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise not_regular_error(name)


def not_regular_error(name: str) -> ImageError:
    return ImageError(
        f"cannot read {name}: it is a pipe or a device; give the path of an image, or - to read "
        "standard input"
    )


def _existing(text: str) -> Path | None:
    if not text or len(text) > MAX_PATH_LENGTH:
        return None
    for path in (text, os.path.expanduser(text)):
        if os.path.exists(path):
            return Path(path)
    wanted = Path(os.path.expanduser(text))
    twins = [
        name
        for name in _siblings(wanted)
        if _folded(name) == _folded(wanted.name) and wanted.with_name(name).exists()
    ]
    return wanted.with_name(twins[0]) if len(twins) == 1 else None


def _folded(name: str) -> str:
    """Normalize a name: macOS puts U+202F into screenshot names, and old disks hold NFD."""
    return re.sub(r"\s", " ", unicodedata.normalize("NFC", name))


def _siblings(path: Path) -> list[str]:
    try:
        return os.listdir(path.parent)
    except (OSError, ValueError):
        return []


def _hint(text: str) -> str:
    """Say what to do about a missing file, naming the most similar one in its folder."""
    if len(text) > MAX_PATH_LENGTH:
        return "it is too long for a path; if it is base64, put data:;base64, before it"
    wanted = Path(os.path.expanduser(text))
    with suppress(OSError, ValueError):  # not a link
        return f"it is a link to {shorten_name(os.readlink(wanted))}, which is not there"
    near = nearest_names(wanted.name, _siblings(wanted), cutoff=NEAR_FILE)
    return (
        f"did you mean {shorten_name(str(wanted.with_name(near[0])))}?"
        if near
        else "check the path"
    )


def download_image(url: str, name: str) -> bytes:
    """Download ``url``; ``name`` is what messages call it. Raises ImageError."""
    try:
        return download(url, MAX_BYTES)
    except DownloadTooLarge as error:
        raise too_large_error(name) from error
    except DownloadRefused as error:
        raise ImageError(
            f"cannot download {name}: {' '.join(str(error).split())}; "
            "check the URL, or save the image and give its path"
        ) from error


def without_secrets(url: str) -> str:
    """Return a URL without its user, password, query and fragment: they may be secrets."""
    return SECRET_PARTS.sub("", url)
