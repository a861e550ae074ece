"""The samplers of answers that are decoded together: one call chooses a token of each.

Each answer keeps its own state, so it has the tokens that it would have alone, whoever joins or
leaves the batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol

import mlx.core as mx

from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.sampler import (
    Sampler,
    SamplerState,
    SamplingParams,
    join_states,
    split_state,
)


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Log probabilities of a chosen token and of the most likely ones, still to be computed.

    chosen: (1,) float32. top_ids: (K,) int32, top: (K,) float32, in no order.
    """

    chosen: mx.array
    top_ids: mx.array
    top: mx.array

    @property
    def arrays(self) -> list[mx.array]:
        return [self.chosen, self.top_ids, self.top]


class TokenConstraint(Protocol):
    """Masks the tokens that may not come next: a grammar, or a thought budget."""

    def mask_logits(self, logits: mx.array) -> mx.array: ...

    def accept(self, token: int) -> bool: ...


@dataclass(eq=False)
class RowSampler:
    """How one answer samples, and the state in which it is.

    prompt_ids: for the repetition penalty, which looks at the prompt too. num_top: how many tokens
    to score beside the chosen one; None where nothing is scored.
    """

    config: GenerationConfig
    seed: int
    prompt_ids: Sequence[int]
    vocab_size: int
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    num_top: int | None = None
    constraint: TokenConstraint | None = None
    params: SamplingParams = field(init=False)
    own_state: SamplerState = field(init=False)  # out of date while ``joined``
    joined: "SampledRows | None" = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        self.params = replace(
            SamplingParams.from_config(self.config),
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=tuple(self.logit_bias.items()),
        )
        self.replay([])

    @property
    def state(self) -> SamplerState:
        if self.joined is not None:
            self.joined.separate()
        return self.own_state

    @state.setter
    def state(self, state: SamplerState) -> None:
        if self.joined is not None:
            self.joined.separate()
        self.own_state = state

    @property
    def waits(self) -> bool:
        """Whether the next token cannot be chosen before the last one is known."""
        return self.constraint is not None

    def replay(self, generated_ids: Sequence[int]) -> None:
        """Take the state that is reached after these tokens of the answer."""
        sampler = Sampler((self.params,))
        self.state = sampler.init_state(
            [self.seed], [self.prompt_ids], self.vocab_size, [generated_ids]
        )

    @property
    def needs_logits(self) -> bool:
        """Whether more is done with logits than to choose by ``params``."""
        return self.waits or self.num_top is not None

    def mask(self, logits: mx.array) -> mx.array:
        """Set tokens that the constraint does not allow to -inf: (1, vocab) -> (1, vocab)."""
        return logits if self.constraint is None else self.constraint.mask_logits(logits)


@dataclass(eq=False)
class SampledRows:
    """The samplers of the rows of a batch as one, with one state while the rows stay the same."""

    samplers: list[RowSampler]
    sampler: Sampler
    state: SamplerState

    @classmethod
    def of(cls, samplers: Sequence[RowSampler]) -> "SampledRows":
        """Return those of a batch: the same ones as for the token before, where it had the rows."""
        before = samplers[0].joined
        if before is not None and before.samplers == [*samplers]:
            return before
        states = [one.state for one in samplers]
        rows = cls(
            [*samplers], batch_sampler(tuple(one.params for one in samplers)), join_states(states)
        )
        for one in samplers:
            one.joined = rows
        return rows

    def separate(self) -> None:
        """Give each sampler its own state again."""
        own = split_state(self.state, self.sampler.params)
        for one, state in zip(self.samplers, own, strict=True):
            one.own_state, one.joined = state, None


def sample_rows(samplers: Sequence[RowSampler], logits: mx.array) -> mx.array:
    """Choose the next token of each answer, and go on to its next state: (B, vocab) -> (B,)."""
    rows = SampledRows.of(samplers)
    tokens, rows.state = rows.sampler(logits, rows.state)
    return tokens


@lru_cache(maxsize=32)
def batch_sampler(params: tuple[SamplingParams, ...]) -> Sampler:
    """Return the sampler of a batch; the same batch is sampled from for many tokens."""
    return Sampler(params)


def score_token(logits: mx.array, token: mx.array, num_top: int) -> TokenScores:
    """Score a token (1,) and the ``num_top`` most likely ones by logits (1, vocab)."""
    wide = logits.astype(mx.float32).reshape(-1)
    log_probs = wide - mx.logsumexp(wide)
    count = min(num_top, log_probs.size)
    if count == 0:
        top = mx.zeros(0, dtype=mx.int32)
    elif count == log_probs.size:
        top = mx.arange(count)
    else:
        top = mx.argpartition(-log_probs, kth=count - 1)[:count]
    return TokenScores(log_probs[token], top.astype(mx.int32), log_probs[top])
