"""A text model of mlx-lm that drafts: no vision encoder, and any size of the same base vocabulary.

It reads the prompt without the tokens that it does not have: those of images, and tags of boxes.
What it drafts is verified by the model that sees, so it costs no quality.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx
from mlx.utils import tree_flatten

from internvl3_mlx.errors import UserError
from internvl3_mlx.generation.prompt_cache import TextDraftCache
from internvl3_mlx.prompt.tokenizer import Tokenizer, read_spellings

PREFILL_STEP_SIZE = 512


@dataclass(frozen=True, eq=False)
class TextDraft:
    """A loaded text model. ``spelling`` returns the bytes of a token, none for unknown ids."""

    name: str
    model: Any
    spelling: Callable[[int], bytes]
    shared: WeakKeyDictionary[Tokenizer, int] = field(
        default_factory=WeakKeyDictionary[Tokenizer, int]
    )

    @cached_property
    def weights_nbytes(self) -> int:
        """Bytes of the model's parameters."""
        parameters: Any = tree_flatten(self.model.parameters())
        return sum(int(value.nbytes) for _, value in parameters)

    def count_shared(self, tokenizer: Tokenizer) -> int:
        """Return up to which id both vocabularies have the same tokens, those of images aside.

        They are compared once. Raises UserError unless that is so for all plain tokens.
        """
        if tokenizer not in self.shared:
            self.shared[tokenizer] = self.compare(tokenizer)
        return self.shared[tokenizer]

    def compare(self, tokenizer: Tokenizer) -> int:
        images = image_ids(tokenizer)
        # small vocabularies begin with special tokens, so that plain ones follow those of images
        end = min((i for i in images if i >= tokenizer.plain_size), default=tokenizer.plain_size)
        for token in range(end):
            ours, theirs = tokenizer.spelling(token), self.spelling(token)
            if ours == theirs or token in images:
                continue
            if token < tokenizer.plain_size:
                raise UserError(
                    f"{self.name} has a different vocabulary: token {token} is {show(theirs)} "
                    f"there and {show(ours)} here; draft with a text model of the same base "
                    "vocabulary, or with a smaller size of the same family"
                )
            return token
        return end


def image_ids(tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset((tokenizer.image_start_id, tokenizer.image_id, tokenizer.image_end_id))


def show(token: bytes) -> str:
    return repr(token.decode(errors="replace")) if token else "missing"


def load_text_draft(name: str, folder: Path) -> TextDraft:
    """Load a text model through mlx-lm; raises UserError for what it cannot load."""
    import mlx_lm
    from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache

    try:
        model, *_ = mlx_lm.load(str(folder))
    except Exception as error:  # noqa: BLE001  mlx-lm and its libraries raise whatever they like
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"cannot load the draft model {name} through mlx-lm: {reason}; name a text model that "
            "mlx-lm knows, or a smaller size of the same family"
        ) from error
    if not can_trim_prompt_cache(make_prompt_cache(model)):
        raise UserError(
            f"{name} cannot draft: its cache cannot drop rejected tokens; use a model with plain "
            "attention in all layers"
        )
    return TextDraft(name, model, read_spellings(folder))


@dataclass(eq=False)
class TextReader:
    """A text model that has read the prompt, and its cache.

    shared: ids below it are the same, but for those of images.
    """

    model: Any
    shared: int
    images: frozenset[int]
    cache: TextDraftCache
    prompt_ids: list[int]

    @classmethod
    def open(
        cls, draft: TextDraft, tokenizer: Tokenizer, token_ids: Sequence[int], cache: TextDraftCache
    ) -> "TextReader":
        """Read the prompt, beginning after what is cached."""
        from mlx_lm.models.cache import make_prompt_cache

        reader = cls(draft.model, draft.count_shared(tokenizer), image_ids(tokenizer), cache, [])
        reader.prompt_ids = reader.readable(token_ids)
        known = common_length(cache.ids, reader.prompt_ids)
        if not cache.layers or not known:
            cache.layers, cache.ids, known = make_prompt_cache(draft.model), [], 0
        reader.trim_to(known)
        for start in range(known, len(reader.prompt_ids), PREFILL_STEP_SIZE):
            step = reader.prompt_ids[start : start + PREFILL_STEP_SIZE]
            draft.model(mx.array([step]), cache=cache.layers)
            mx.eval([layer.state for layer in cache.layers])
        return reader

    def readable(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token < self.shared and token not in self.images]

    def read(self, tokens: mx.array) -> mx.array:
        return self.model(tokens[None], cache=self.cache.layers)[:, -1, : self.shared]

    def rewind(self, count: int) -> None:
        for layer in self.cache.layers:
            layer.trim(count)

    def trim_to(self, length: int) -> None:
        for layer in self.cache.layers:
            layer.trim(max(int(layer.offset) - length, 0))

    def close(self, generated_ids: Sequence[int]) -> None:
        self.cache.ids = [*self.prompt_ids, *self.readable(generated_ids)]
        self.trim_to(len(self.cache.ids))


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Count the tokens that both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))
