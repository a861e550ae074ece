"""Speculative decoding: draft several tokens cheaply, verify them at once, accept the right ones.

A draft token is accepted where greedy decoding would have chosen it, so the answer is the same to
the token. With a draft model: Leviathan et al., arXiv 2211.17192; by prompt lookup: the n-gram
matching known from transformers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, cast

import mlx.core as mx
import numpy as np

from internvl3_mlx.errors import UserError
from internvl3_mlx.generation.engine import Engine, check_finite
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.prefill import Prefill, open_prefill
from internvl3_mlx.generation.processor import ModelInputs
from internvl3_mlx.generation.prompt_cache import PromptCache
from internvl3_mlx.generation.sampler import SamplingParams
from internvl3_mlx.models.internvl import InternVL

MAX_MATCH_TOKENS, MIN_MATCH_TOKENS = 4, 2  # last tokens that must have occurred before


class Drafter(Protocol):
    """Proposes how a sequence continues."""

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        """Draft up to ``count`` tokens that follow ``ids``."""
        ...

    def close(self, ids: Sequence[int]) -> None:
        """End drafting; ``ids`` are the prompt and all accepted tokens."""
        ...


@dataclass
class AcceptanceStats:
    """Counts drafted tokens and how many of them were accepted."""

    drafted: int = 0
    accepted: int = 0


def check_greedy(config: GenerationConfig) -> None:
    """Raise UserError where tokens are sampled or penalized."""
    if not SamplingParams.from_config(config).is_greedy:
        raise UserError(
            "speculative decoding is greedy; drop temperature and repetition_penalty, "
            "or lookup and draft_model"
        )


@dataclass
class SpeculativeDecoder:
    """Decodes with a drafter that proposes ``num_draft_tokens`` at a time."""

    drafter: Drafter
    num_draft_tokens: int
    stats: AcceptanceStats

    def decode(self, engine: Engine, ids: list[int], logits: mx.array, limit: int) -> Iterator[int]:
        """Yield up to ``limit`` tokens. ids: the prompt, all of which the engine has read."""
        known, end = list(ids), len(ids) + limit
        token = int(mx.argmax(logits, axis=-1).item())  # type: ignore[arg-type]
        try:
            while True:
                yield token
                known.append(token)
                if len(known) == end:
                    return
                draft, best = self.draft_and_verify(engine, known, end - len(known) - 1)
                num_accepted = common_prefix_length(draft, best)
                engine.rewind(len(draft) - num_accepted)
                self.stats.drafted += len(draft)
                self.stats.accepted += num_accepted
                for accepted in draft[:num_accepted]:
                    yield accepted
                    known.append(accepted)
                token = best[num_accepted]
        finally:
            self.drafter.close(known)

    def draft_and_verify(
        self, engine: Engine, known: list[int], left: int
    ) -> tuple[list[int], list[int]]:
        """Draft up to ``left`` tokens and read them after the last known one.

        Returns the draft and, one longer, the greedy choice after each of the tokens read.
        """
        count = min(self.num_draft_tokens, left)
        if engine.uses_dynamic_ntk(self.num_draft_tokens):
            count = 0
        draft = self.drafter.propose(known, count) if count else []
        logits = engine.verify([known[-1], *draft])
        check_finite(logits)
        best = mx.argmax(logits, axis=-1)[0]
        return draft, cast(list[int], best.tolist())


def common_prefix_length(draft: Sequence[int], best: Sequence[int]) -> int:
    """Count the draft tokens before the first wrong one."""
    pairs = enumerate(zip(draft, best, strict=False))
    return next(
        (at for at, (drafted, right) in pairs if drafted != right), min(len(draft), len(best))
    )


class PromptLookup:
    """Prompt lookup: what followed the last few tokens before may follow them again.

    Good where answers repeat the prompt or themselves: transcripts, tables, code.
    """

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        sequence = np.asarray(ids)
        for length in range(MAX_MATCH_TOKENS, MIN_MATCH_TOKENS - 1, -1):
            if len(sequence) <= length:
                continue
            windows = np.lib.stride_tricks.sliding_window_view(sequence[:-1], length)
            found = np.flatnonzero((windows == sequence[-length:]).all(axis=1))
            if found.size:
                start = int(found[-1]) + length
                return sequence[start : start + count].tolist()
        return []

    def close(self, ids: Sequence[int]) -> None:
        """Do nothing: there is no state."""


@dataclass(eq=False)
class DraftModel:
    """A smaller model of the family that drafts; its prompt cache belongs to the conversation's."""

    model: InternVL
    inputs: ModelInputs
    generation_config: GenerationConfig
    prompt_cache: PromptCache
    prefill: Prefill = field(init=False)
    fed_ids: list[int] = field(init=False)

    def __post_init__(self) -> None:
        # Decoding stops speculating before dynamic NTK begins, so the draft model needs none.
        # It reads what the large model reads, and decides nothing about tiles.
        config = replace(self.generation_config, ntk=False, seed=None, visual_compression=False)
        self.prefill = open_prefill(self.model, self.inputs, config, self.prompt_cache)
        self.prefill.run(self.prefill.encode_images())
        self.fed_ids = list(self.inputs.token_ids)

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        """Drop rejected drafts from the cache, read what replaced them, then draft greedily."""
        engine = self.prefill.engine
        start = len(self.inputs.token_ids)
        same = common_prefix_length(self.fed_ids[start:], ids[start:])
        engine.rewind(len(self.fed_ids) - start - same)
        self.fed_ids = list(ids)
        logits = engine.verify(list(ids[start + same :]))[:, -1]
        draft: list[int] = []
        while True:
            draft.append(int(mx.argmax(logits, axis=-1).item()))  # type: ignore[arg-type]
            if len(draft) == count:
                return draft
            self.fed_ids.append(draft[-1])
            logits = engine.step(mx.array(draft[-1:]))

    def close(self, ids: Sequence[int]) -> None:
        """Leave only accepted tokens in the prompt cache."""
        start = len(self.inputs.token_ids)
        same = common_prefix_length(self.fed_ids[start:], ids[start:])
        num_cached = min(self.prefill.engine.num_cached, start + same)
        self.prefill.commit(self.fed_ids[start : start + same], num_cached)
