"""From the parts of a message to what the engine reads; images are decoded on threads meanwhile.

Parsing is the same for all APIs: each has a table of readers by the part's type. Media come as
data URIs, base64 or http(s) URLs. Paths and ``file:`` URLs are refused: they would be the server's
files.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

from internvl3_mlx.errors import UserError
from internvl3_mlx.images.download import (
    DownloadPolicy,
    DownloadRefused,
    DownloadTooLarge,
    download,
    download_policy,
)
from internvl3_mlx.images.fetch import URL_PATTERN, locate, shorten_name, without_secrets
from internvl3_mlx.images.load import image_size
from internvl3_mlx.images.pages import TIFF_HEADS, open_pages
from internvl3_mlx.images.pdf import read_pages
from internvl3_mlx.serving.errors import APIError, invalid
from internvl3_mlx.serving.limits import MB, MEGAPIXEL, ServerLimits
from internvl3_mlx.serving.requests import (
    ChatMessage,
    ContentPart,
    ImagePart,
    TextPart,
    VideoPart,
)

Role = Literal["user", "assistant"]
PDF_HEAD = b"%PDF"
DETAIL_TILES = {None: None, "auto": None, "high": None, "original": None, "low": 1}
DOWNLOADS, DECODERS = 16, 2
downloads = ThreadPoolExecutor(DOWNLOADS, "download")
decoders = ThreadPoolExecutor(DECODERS, "decode")


@dataclass(frozen=True)
class MediaSource:
    """An image, PDF or video that a request names.

    source: a data URI, a URL, or base64. where: the field, for errors. max_tiles: of the image.
    """

    source: str
    where: str
    kind: Literal["image", "video"] = "image"
    is_base64: bool = False
    max_tiles: int | None = None


Part = TextPart | MediaSource
PartReader = Callable[[Mapping[str, Any], str], Part]


@dataclass(frozen=True)
class ParsedMessage:
    """A message as the request has it, its media not opened yet."""

    role: Role
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class ParsedChat:
    """The messages of a request. system: the system prompt, None where none was given."""

    messages: tuple[ParsedMessage, ...]
    system: str | None = None


def numbered_messages(
    messages: Sequence[Any], field: str = "messages"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each message of a request with its place, such as ``messages[0]``."""
    for number, message in enumerate(messages):
        where = f"{field}[{number}]"
        if not isinstance(message, dict):
            raise invalid(f"{where} must be an object with role and content", where)
        yield where, message


def read_parts(content: Any, where: str, readers: Mapping[str, PartReader]) -> tuple[Part, ...]:
    """Read a message's content: a string, or a list of parts that are kept in their order."""
    if content is None:
        return ()
    if isinstance(content, str):
        return (TextPart(content),)
    if not isinstance(content, list):
        raise invalid(f"{where} must be text or a list of parts", where)
    return tuple(_read_part(part, f"{where}[{n}]", readers) for n, part in enumerate(content))


def _read_part(part: Any, where: str, readers: Mapping[str, PartReader]) -> Part:
    if isinstance(part, str):
        return TextPart(part)
    if not isinstance(part, dict):
        raise invalid(f"{where} must be an object with a type", where)
    kind = part.get("type")
    reader = readers.get(kind) if isinstance(kind, str) else None
    if reader is None:
        known = ", ".join(readers)
        given = shorten_name(str(kind)) if isinstance(kind, str) else "missing or not text"
        raise invalid(f"{where}.type is {given}; use one of {known}", f"{where}.type")
    return reader(part, where)


def text_of(part: Mapping[str, Any], where: str, name: str = "text") -> str:
    """Return a text field of a part."""
    text = part.get(name)
    if not isinstance(text, str):
        raise invalid(f"{where}.{name} must be text", f"{where}.{name}")
    return text


def read_text(part: Mapping[str, Any], where: str) -> TextPart:
    return TextPart(text_of(part, where))


def tiles_for(detail: Any, where: str) -> int | None:
    """Return the most tiles that a ``detail`` allows: one for ``low``."""
    if detail is not None and not isinstance(detail, str) or detail not in DETAIL_TILES:
        raise invalid(f"{where} is not known; use auto, low, high or original", where)
    return DETAIL_TILES[detail]


def read_url(value: Any, where: str, name: str) -> str:
    """Return the URL of ``{"url": ...}`` or of a plain string."""
    url = value.get("url") if isinstance(value, dict) else value
    if not isinstance(url, str) or not url:
        raise invalid(f"{where}.{name} must be a data URI or an http(s) URL", f"{where}.{name}")
    return url


def joined_text(parts: Iterable[Part], where: str) -> str:
    """Return the text of parts that may hold nothing else, as those of a system prompt."""
    texts = []
    for part in parts:
        if not isinstance(part, TextPart):
            raise invalid(f"{where}: only a user's message can have images", where)
        texts.append(part.text)
    return "".join(texts)


def check_media(messages: Sequence[ParsedMessage], limits: ServerLimits) -> None:
    """Raise APIError for too many media, and for those outside of a user's message."""
    for message in messages:
        if message.role == "assistant":
            joined_text(message.parts, "an assistant's message")
    _check_count(sum(isinstance(p, MediaSource) for m in messages for p in m.parts), limits)


def _check_count(count: int, limits: ServerLimits) -> None:
    if count > limits.max_images:
        raise invalid(
            f"the request has {count} images, pages and videos, but the server takes at most "
            f"{limits.max_images}; send fewer"
        )


async def open_chat(chat: ParsedChat, limits: ServerLimits) -> tuple[ChatMessage, ...]:
    """Open all media of a conversation. The same image in several messages is opened once.

    Raises APIError.
    """
    check_media(chat.messages, limits)
    named = {p for m in chat.messages for p in m.parts if isinstance(p, MediaSource)}
    sources = sorted(named, key=lambda source: source.where)
    unique = {(one.source, one.kind, one.is_base64): one for one in sources}
    results = await asyncio.gather(*(_open(one, limits) for one in unique.values()))
    opened = dict(zip(unique, results, strict=True))

    def parts_of(message: ParsedMessage) -> tuple[ContentPart, ...]:
        parts: list[ContentPart] = []
        for part in message.parts:
            if isinstance(part, TextPart):
                parts.append(part)
                continue
            for medium in opened[part.source, part.kind, part.is_base64]:
                tiles = part.max_tiles
                parts.append(
                    replace(medium, max_tiles=tiles) if isinstance(medium, ImagePart) else medium
                )
        return tuple(parts)

    made = tuple(ChatMessage(message.role, parts_of(message)) for message in chat.messages)
    _check_count(sum(not isinstance(part, TextPart) for m in made for part in m.parts), limits)
    return made


Medium = ImagePart | VideoPart


async def _open(source: MediaSource, limits: ServerLimits) -> list[Medium]:
    loop = asyncio.get_running_loop()
    try:
        if _scheme(source) in ("http", "https"):
            data = await loop.run_in_executor(downloads, _download, source, limits)
        else:
            data = await loop.run_in_executor(decoders, _decode, source)
        return await loop.run_in_executor(decoders, _open_bytes, data, source, limits)
    except APIError:
        raise
    except UserError as error:
        raise invalid(f"{source.where}: {error}", source.where) from error


def _scheme(source: MediaSource) -> str:
    """Return the scheme of a URL; raise APIError for one that is not read here."""
    if source.is_base64 and not source.source.startswith("data:"):
        return "data"
    found = URL_PATTERN.match(source.source)
    scheme = (found[1] or found[2]).lower() if found else ""
    if scheme not in ("data", "http", "https"):
        given = f"{scheme} URLs" if scheme else "paths"
        raise invalid(
            f"{source.where}: {given} are not read by the server; send the file as a data URI",
            source.where,
        )
    return scheme


def _decode(source: MediaSource) -> bytes:
    is_uri = source.source.startswith("data:")
    text = source.source if is_uri else f"data:;base64,{source.source}"
    data = locate(text).source
    assert isinstance(data, bytes)
    return data


def _download(source: MediaSource, limits: ServerLimits) -> bytes:
    """Download a file; by default not from this machine or its local network."""
    name = shorten_name(without_secrets(source.source))
    try:
        with download_policy(DownloadPolicy(allow_private=limits.allow_private_urls)):
            return download(source.source, limits.max_body_mb * MB)
    except DownloadTooLarge as error:
        raise invalid(
            f"{source.where}: {name} is larger than {limits.max_body_mb} MB; send a smaller file",
            source.where,
        ) from error
    except DownloadRefused as error:
        reason = " ".join(str(error).split())
        raise invalid(
            f"{source.where}: cannot download {name}: {reason}; send the file as a data URI",
            source.where,
        ) from error


def _open_bytes(data: bytes, source: MediaSource, limits: ServerLimits) -> list[Medium]:
    """Check a file's size in pixels, and open the pages of a document."""
    if source.kind == "video":
        return [VideoPart(data, name=source.where)]
    if data[:4] == PDF_HEAD or data[:4] in TIFF_HEADS:
        pages = read_pages(data) if data[:4] == PDF_HEAD else open_pages(data)
        for page in pages:
            _check_pixels(page.width, page.height, source, limits)
        return [ImagePart(page, name=source.where) for page in pages]
    _check_pixels(*image_size(data), source, limits)
    return [ImagePart(data, name=source.where)]


def _check_pixels(width: int, height: int, source: MediaSource, limits: ServerLimits) -> None:
    if width * height > limits.max_megapixels * MEGAPIXEL:
        raise invalid(
            f"{source.where} has {width}x{height} pixels, more than the server's "
            f"{limits.max_megapixels} million; send a smaller copy",
            source.where,
        )
