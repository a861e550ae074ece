"""The last responses, for ``previous_response_id``: bounded in number and bytes."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from internvl3_mlx.serving.errors import NOT_FOUND, APIError
from internvl3_mlx.serving.requests import ChatMessage, ImagePart, TextPart, VideoPart

MAX_STORED, MAX_STORED_NBYTES = 64, 256 * 2**20


@dataclass(frozen=True, eq=False)
class StoredResponse:
    """A response, and the conversation with its answer. nbytes: of its text and images."""

    content: Mapping[str, Any]
    messages: tuple[ChatMessage, ...]
    nbytes: int = 0


@dataclass(eq=False)
class ResponseStore:
    """Keeps the last responses in memory; the oldest is dropped first."""

    stored: OrderedDict[str, StoredResponse] = field(
        default_factory=OrderedDict[str, StoredResponse]
    )

    def get(self, id: str, name: str = "previous_response_id") -> StoredResponse:
        """Return a response; raise APIError where it is not kept (any more)."""
        found = self.stored.get(id)
        if found is None:
            message = f"no response {id[:80]!r} is kept; send the whole conversation again"
            raise APIError(NOT_FOUND, message, name, "response_not_found")
        return found

    def add(self, id: str, response: StoredResponse) -> None:
        size = sum(part_nbytes(part) for message in response.messages for part in message.parts)
        self.stored[id] = replace(response, nbytes=size)
        while self.stored and (len(self.stored) > MAX_STORED or self.nbytes > MAX_STORED_NBYTES):
            self.stored.popitem(last=False)

    def remove(self, id: str) -> None:
        self.get(id, "response_id")
        del self.stored[id]

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self.stored.values())


def part_nbytes(part: TextPart | ImagePart | VideoPart) -> int:
    """Return the bytes that a part takes in memory."""
    if isinstance(part, TextPart):
        return len(part.text)
    if isinstance(part, VideoPart):
        return len(part.video)
    image = part.image
    return len(image) if isinstance(image, bytes) else image.width * image.height * 3
