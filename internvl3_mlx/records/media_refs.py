"""References to images and videos in records: paths, URLs, bytes and base64."""

import re
from base64 import b64decode
from binascii import Error as Base64Error
from typing import Any

from internvl3_mlx.records.json_values import RecordError

MediaRef = str | bytes  # a path, a data or file URL, or the bytes of the file
MediaRefs = tuple[MediaRef, ...]
PATH_KEYS = ("path", "url", "image", "image_url", "video", "video_url", "source")
BYTES_KEYS = ("bytes", "data")
# How the base64 of JPEG, PNG, GIF, WebP, BMP and TIFF files begins.
BASE64_IMAGE = re.compile(
    r"(/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk|SUkq|TU0AKg)[A-Za-z0-9+/\s]{40,}=*\s*"
)


def parse_media_ref(value: Any) -> MediaRef | None:
    """Return the file that a value names, or None if it names none.

    Read are paths, URLs, bytes, base64, and objects with any of these under ``bytes``, ``path``,
    ``url`` or ``image``, as the ``datasets`` library and ms-swift write them, or ``data``, as
    Anthropic's messages do.
    """
    if isinstance(value, bytes | bytearray):
        return bytes(value) or None
    if isinstance(value, str):
        return (_decode_base64(value) if BASE64_IMAGE.fullmatch(value) else value) or None
    if isinstance(value, dict):
        content = next((value[key] for key in BYTES_KEYS if value.get(key)), None)
        if isinstance(content, str):
            return _decode_base64(content)
        if content:
            return parse_media_ref(content)
        return next((parse_media_ref(value[key]) for key in PATH_KEYS if value.get(key)), None)
    return None


def _decode_base64(text: str) -> bytes:
    try:
        return b64decode(text, validate=False)
    except (Base64Error, ValueError) as error:
        raise RecordError(
            f"an image in base64 cannot be decoded ({error}); export it again"
        ) from error
