"""Prompt lookup: what followed the last few tokens before may follow them again.

Good where answers repeat the prompt or themselves: transcripts, tables, code. The n-gram matching
is that of transformers; here an index finds the last place in constant time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from internvl3_mlx.generation.speculative import Draft

MATCH_LENGTHS = (4, 3, 2)  # last tokens that must have occurred before; the longest is preferred


@dataclass
class PromptLookup:
    """Drafts from an index: n-gram -> where it was followed by something last.

    num_indexed: tokens that were followed by another and are in the index.
    """

    places: dict[tuple[int, ...], int] = field(default_factory=dict[tuple[int, ...], int])
    num_indexed: int = 0
    cost: float = 0.0

    def can_propose(self, ids: Sequence[int]) -> bool:
        return self.find(ids) is not None

    def propose(self, ids: Sequence[int], count: int) -> Draft | None:
        place = self.find(ids)
        if place is None:
            return None
        return Draft(mx.array([*ids[place : place + count]], dtype=mx.int32))

    def find(self, ids: Sequence[int]) -> int | None:
        """Return the place after the last earlier occurrence of the last tokens."""
        for place in range(self.num_indexed + 1, len(ids)):
            for length in MATCH_LENGTHS:
                if place >= length:
                    self.places[tuple(ids[place - length : place])] = place
        self.num_indexed = max(len(ids) - 1, 0)
        for length in MATCH_LENGTHS:
            found = self.places.get(tuple(ids[-length:])) if len(ids) > length else None
            if found is not None:
                return found
        return None

    def accept(self, count: int) -> None:
        """Do nothing: only known tokens are indexed."""

    def close(self, ids: Sequence[int]) -> None:
        """Do nothing: the index ends with the answer."""
