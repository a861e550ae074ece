"""Read the body of a request within its limits, as a JSON object."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from pydantic_core import from_json

from internvl3_mlx.serving.errors import TIMED_OUT, TOO_LARGE, APIError, invalid
from internvl3_mlx.serving.limits import MB, ServerLimits


async def read_json(
    chunks: AsyncIterator[bytes], stated: str | None, limits: ServerLimits
) -> dict[str, Any]:
    """Read a body as a JSON object. stated: its length as the headers give it.

    Raises APIError for one that is too large, too slow, or not a JSON object.
    """
    limit = limits.max_body_mb * MB
    if stated is not None and stated.isdecimal() and int(stated) > limit:
        raise _too_large(limits)
    try:
        body = await asyncio.wait_for(_read(chunks, limit, limits), limits.body_timeout)
    except asyncio.TimeoutError:
        message = (
            f"the request did not arrive within {limits.body_timeout:g} seconds; send it again"
        )
        raise APIError(TIMED_OUT, message, unread=True) from None
    return parse_json(body)


async def _read(chunks: AsyncIterator[bytes], limit: int, limits: ServerLimits) -> bytes:
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > limit:
            raise _too_large(limits)
    return bytes(body)


def _too_large(limits: ServerLimits) -> APIError:
    return APIError(
        TOO_LARGE,
        f"the request is larger than {limits.max_body_mb} MB; send fewer or smaller images",
        code="request_too_large",
        unread=True,
    )


def parse_json(body: bytes) -> dict[str, Any]:
    """Parse a JSON object; NaN and infinities are not JSON, and nesting is bounded."""
    try:
        content = from_json(body or b"null", allow_inf_nan=False)
    except ValueError as error:
        raise invalid(f"the body is not JSON: {error}; correct it and send it again") from None
    if not isinstance(content, dict):
        raise invalid("the body is not a JSON object; send one with the fields of the request")
    return content
