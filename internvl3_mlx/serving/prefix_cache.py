"""Keys and values of prompts and answers that may be continued, over turns and requests."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from internvl3_mlx.generation.prompt_cache import CacheKey, PromptCache
from internvl3_mlx.models.cache import LayerCache

SHORTEST_ENTRY = 16  # tokens: shorter prefixes are read again as fast as they are found


@dataclass(eq=False)
class PrefixEntry:
    """What one answer has read. model: which one, with its adapter.

    prompt_tokens: of them, the prompt. is_conversation: has images or earlier answers, or was
    continued before; others are evicted first.
    """

    model: str
    key: CacheKey
    layers: list[LayerCache]
    prompt_tokens: int
    is_conversation: bool

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def is_continued_by(self, key: CacheKey) -> bool:
        """Tell whether ``key`` begins with this prompt, or has it with another answer."""
        return self.key.common_prefix_length(key) >= min(self.prompt_tokens, len(self.key))


@dataclass(eq=False)
class PrefixCache:
    """Entries in the order of their last use, at most ``limit_nbytes``.

    An entry without images and earlier answers never evicts a conversation: the titles and tags
    that a chat program asks for pass through without a trace.
    """

    limit_nbytes: int
    entries: list[PrefixEntry] = field(default_factory=list[PrefixEntry])

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    def lookup(self, model: str, key: CacheKey, capacity: int = 0) -> PromptCache:
        """Return a prompt cache that holds the longest known prefix of ``key``, maybe none of it.

        Its layers share memory with the entry until they are written to; then they take space for
        ``capacity`` tokens.
        """
        best, length = None, 0
        for entry in self.entries:
            if entry.model == model:
                common = entry.key.common_prefix_length(key)
                best, length = (entry, common) if common > length else (best, length)
        if best is None or length < SHORTEST_ENTRY:
            return PromptCache()
        self.entries.remove(best)
        self.entries.append(best)
        best.is_conversation |= length >= best.prompt_tokens
        layers = [layer.fork() for layer in best.layers]
        for layer in layers:
            layer.capacity = capacity
        return PromptCache(layers=layers, key=best.key)

    def store(self, entry: PrefixEntry) -> None:
        """Keep an entry, in place of those that it continues. Its arrays must be evaluated."""
        if len(entry.key) < SHORTEST_ENTRY or entry.nbytes > self.limit_nbytes:
            return
        for other in [*self.entries]:
            if other.model == entry.model and other.is_continued_by(entry.key):
                entry.is_conversation |= other.is_conversation
                self.entries.remove(other)
        self.entries.append(entry)
        self.shrink(self.limit_nbytes)

    def shrink(self, limit_nbytes: int) -> None:
        """Evict entries until the rest fits: the least recently used, conversations last."""
        while self.entries and self.nbytes > limit_nbytes:
            passing = [entry for entry in self.entries if not entry.is_conversation]
            self.entries.remove((passing or self.entries)[0])

    def drop(self, model: str) -> None:
        """Forget everything of a model."""
        self.entries = [entry for entry in self.entries if entry.model != model]


def compact_layers(layers: Sequence[LayerCache]) -> list[LayerCache]:
    """Copy caches without their free space, and evaluate them."""
    compact = [layer.compact() for layer in layers]
    mx.eval([layer.state for layer in compact])
    return compact
