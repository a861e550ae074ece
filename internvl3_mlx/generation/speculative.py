"""Speculative decoding: guess several tokens cheaply, read them at once, keep those that are right.

Only what greedy decoding would have chosen is kept, so the answer is the same to the token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import mlx.core as mx
import numpy as np

from internvl3_mlx.errors import UserError
from internvl3_mlx.generation.engine import Engine
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.processor import ModelInputs
from internvl3_mlx.generation.prompt_cache import CacheKey, PromptCache
from internvl3_mlx.generation.sampler import greedy
from internvl3_mlx.models.internvl import InternVL

MAX_MATCH_TOKENS, MIN_MATCH_TOKENS = 4, 2  # tokens at the end that must have stood together before


class Drafter(Protocol):
    """Guesses how a sequence goes on."""

    def propose(self, ids: Sequence[int], count: int) -> list[int]: ...

    def close(self, ids: Sequence[int]) -> None: ...


@dataclass
class AcceptanceStats:
    """Counts what was guessed and what of it was right."""

    drafted: int = 0
    accepted: int = 0


def check_greedy(settings: GenerationConfig) -> None:
    """Refuse to guess where tokens are drawn or penalised."""
    if settings.temperature or settings.repetition_penalty not in (None, 1.0):
        raise UserError(
            "speculation needs greedy decoding; leave temperature at 0 and repetition_penalty unset"
        )


@dataclass
class SpeculativeDecoder:
    """Lets ``drafter`` guess ``count`` tokens at a time."""

    drafter: Drafter
    num_draft_tokens: int
    stats: AcceptanceStats

    def decode(self, engine: Engine, ids: list[int], logits: mx.array, limit: int) -> Iterator[int]:
        """Yield up to ``limit`` tokens. ids: those read so far; the engine holds all of them."""
        known, end = list(ids), len(ids) + limit
        token = int(mx.argmax(logits, axis=-1).item())  # type: ignore[arg-type]
        try:
            while True:
                yield token
                known.append(token)
                if len(known) == end:
                    return
                draft, best = self.draft_and_verify(engine, known, end - len(known) - 1)
                right = common_prefix_length(draft, best)
                engine.rewind(len(draft) - right)
                self.stats.drafted += len(draft)
                self.stats.accepted += right
                for guess in draft[:right]:
                    yield guess
                    known.append(guess)
                token = best[right]
        finally:
            self.drafter.close(known)

    def draft_and_verify(
        self, engine: Engine, known: list[int], left: int
    ) -> tuple[list[int], list[int]]:
        """Guess up to ``left`` tokens, and read them after the last known one. Return them with
        what greedy decoding chooses after each, one more."""
        room = (
            0
            if engine.uses_dynamic_ntk(self.num_draft_tokens)
            else min(self.num_draft_tokens, left)
        )
        draft = self.drafter.propose(known, room) if room else []
        best = mx.argmax(engine.verify([known[-1], *draft]), axis=-1)[0]
        return draft, cast(list[int], best.tolist())


def common_prefix_length(draft: Sequence[int], best: Sequence[int]) -> int:
    """Count the guesses before the first wrong one."""
    pairs = enumerate(zip(draft, best, strict=False))
    return next((at for at, (guess, right) in pairs if guess != right), min(len(draft), len(best)))


class PromptLookup:
    """Guesses that what followed the same few tokens before will follow them again.

    Good where answers repeat the prompt or themselves: transcripts, tables, code.
    """

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        row = np.asarray(ids)
        for length in range(MAX_MATCH_TOKENS, MIN_MATCH_TOKENS - 1, -1):
            if len(row) <= length:
                continue
            windows = np.lib.stride_tricks.sliding_window_view(row[:-1], length)
            found = np.flatnonzero((windows == row[-length:]).all(axis=1))
            if found.size:
                start = int(found[-1]) + length
                return row[start : start + count].tolist()
        return []

    def close(self, ids: Sequence[int]) -> None:
        """Keep nothing."""


@dataclass(eq=False)
class DraftModel:
    """A smaller model of the family that writes ahead; its memory goes with the talk's."""

    model: InternVL
    inputs: ModelInputs
    generation_config: GenerationConfig
    prompt_cache: PromptCache
    engine: Engine = field(init=False)
    fed_ids: list[int] = field(init=False)
    cache_key: CacheKey = field(init=False)

    def __post_init__(self) -> None:
        inputs = self.inputs
        self.cache_key = CacheKey.from_inputs(inputs, self.model.image_id)
        kept, packing = self.prompt_cache.reuse_prefix(
            self.model, self.cache_key, self.generation_config, uses_dynamic_ntk=False
        )
        self.engine = Engine(
            self.model, greedy, self.prompt_cache.layers, inputs.next_position, num_cached=kept,
            ntk=False, kv_quantization=packing,
        )  # fmt: skip
        features = self.prompt_cache.get_image_features(self.model, inputs, kept)
        positions = None if inputs.uses_unit_positions else inputs.positions
        ids = inputs.input_ids[None]
        self.engine.prefill(ids, features, positions, self.generation_config.prefill_step_size)
        self.fed_ids = list(inputs.token_ids)

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        """Read what was kept of the last guesses and what came instead, then write ahead."""
        start = len(self.inputs.token_ids)
        same = common_prefix_length(self.fed_ids[start:], ids[start:])
        self.engine.rewind(len(self.fed_ids) - start - same)
        self.fed_ids = list(ids)
        logits = self.engine.verify(list(ids[start + same :]))[:, -1]
        draft: list[int] = []
        while True:
            draft.append(int(mx.argmax(logits, axis=-1).item()))  # type: ignore[arg-type]
            if len(draft) == count:
                return draft
            self.fed_ids.append(draft[-1])
            logits = self.engine.step(mx.array(draft[-1:]))

    def close(self, ids: Sequence[int]) -> None:
        """Leave the memory with what is certain."""
        start = len(self.inputs.token_ids)
        same = common_prefix_length(self.fed_ids[start:], ids[start:])
        said = self.cache_key.extended(
            self.fed_ids[start : start + same], self.inputs.next_position
        )
        self.prompt_cache.truncate(said, min(self.engine.num_cached, start + same))
