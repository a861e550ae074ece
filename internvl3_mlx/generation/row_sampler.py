"""One answer's own sampler: its random numbers, penalties, constraint and log probabilities.

Answers that are decoded together must not share a random state: each draws from a key of its own,
which is split for every token as MLX splits its global one. So an answer has the tokens that a
single run with the same seed has.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.sampler import needs_history
from internvl3_mlx.generation.structured import Constraint

REPETITION_WINDOW = 20  # tokens that mlx-lm's repetition penalty looks back at


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


@dataclass(eq=False)
class RowSampler:
    """Chooses the tokens of one answer. logits: (1, vocab) of one row.

    prompt_ids: for the repetition penalty, which looks at the prompt too. counts: how often each
    token is in the answer, (vocab,) float32, where a penalty needs them. key: of the next token.
    """

    config: GenerationConfig
    seed: int
    prompt_ids: Sequence[int]
    vocab_size: int
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    num_top: int | None = None
    constraint: Constraint | None = None
    key: mx.array = field(init=False)
    history: mx.array = field(init=False)
    counts: mx.array | None = field(init=False, default=None)
    processors: list[Callable[[mx.array, mx.array], mx.array]] = field(init=False)

    def __post_init__(self) -> None:
        self.processors = logits_processors(self.config, self.logit_bias)
        self.replay([])

    @property
    def is_plain(self) -> bool:
        """Whether the most likely token is chosen, whatever came before."""
        special = self.processors or self.counts is not None or self.constraint is not None
        return self.config.temperature == 0 and not special

    @property
    def waits(self) -> bool:
        """Whether the next token cannot be chosen before the last one is known."""
        return self.constraint is not None

    def replay(self, generated_ids: Sequence[int]) -> None:
        """Take the state that is reached after these tokens of the answer."""
        self.key = mx.random.key(self.seed)
        for _ in generated_ids if self.config.temperature else ():
            self.key = mx.random.split(self.key)[0]
        window = [*self.prompt_ids[-REPETITION_WINDOW:], *generated_ids][-REPETITION_WINDOW:]
        self.history = mx.array(window, dtype=mx.int32)
        self.counts = None
        if self.frequency_penalty or self.presence_penalty:
            ids = mx.array(list(generated_ids), dtype=mx.int32)
            self.counts = mx.zeros(self.vocab_size).at[ids].add(1.0)

    def choose(self, logits: mx.array) -> mx.array:
        """Choose the next token: logits (1, vocab) -> (1,)."""
        if self.constraint is not None:
            logits = self.constraint.mask_logits(logits)
        logits = self.penalized(logits)
        for process in self.processors:
            logits = process(self.history, logits)
        token = self.draw(logits)
        self.note(token)
        return token

    def draw(self, logits: mx.array) -> mx.array:
        """Draw as mlx-lm's sampler does, from this answer's own key."""
        if self.config.temperature == 0:
            return mx.argmax(logits, axis=-1)
        wide = logits.astype(mx.float32)
        log_probs = wide - mx.logsumexp(wide, axis=-1, keepdims=True)
        for narrow in candidate_filters(self.config):
            log_probs = narrow(log_probs)
        self.key, own = mx.random.split(self.key)
        return mx.random.categorical(log_probs * (1.0 / self.config.temperature), key=own)

    def note(self, token: mx.array) -> None:
        """Add a token, (1,), to what the penalties look back at."""
        if needs_history(self.config):
            both = mx.concatenate([self.history, token.astype(mx.int32)])
            self.history = both[-REPETITION_WINDOW:]
        if self.counts is not None:
            self.counts = self.counts.at[token].add(1.0)

    def penalized(self, logits: mx.array) -> mx.array:
        """Subtract OpenAI's penalties for tokens that the answer has already."""
        if self.counts is None:
            return logits
        penalty = self.frequency_penalty * self.counts
        penalty = penalty + self.presence_penalty * (self.counts > 0)
        return logits - penalty.astype(logits.dtype)

    def score(self, logits: mx.array, token: mx.array) -> TokenScores | None:
        """Return the log probability of ``token`` (1,), None where nobody asked for it."""
        if self.num_top is None:
            return None
        wide = logits.astype(mx.float32).reshape(-1)
        log_probs = wide - mx.logsumexp(wide)
        count = min(self.num_top, log_probs.size)
        if count == 0:
            top = mx.zeros(0, dtype=mx.int32)
        elif count == log_probs.size:
            top = mx.arange(count)
        else:
            top = mx.argpartition(-log_probs, kth=count - 1)[:count]
        return TokenScores(log_probs[token], top.astype(mx.int32), log_probs[top])


def logits_processors(
    config: GenerationConfig, logit_bias: Mapping[int, float]
) -> list[Callable[[mx.array, mx.array], mx.array]]:
    """Build mlx-lm's processors for the repetition penalty and for biases."""
    if not needs_history(config) and not logit_bias:
        return []
    from mlx_lm import sample_utils

    penalty = config.repetition_penalty if needs_history(config) else None
    return sample_utils.make_logits_processors(
        logit_bias=dict(logit_bias) or None,
        repetition_penalty=penalty,
        repetition_context_size=REPETITION_WINDOW,
    )


def candidate_filters(config: GenerationConfig) -> list[Callable[[mx.array], mx.array]]:
    """Return what mlx-lm's sampler applies to log probabilities, in its order."""
    from mlx_lm import sample_utils

    filters = list[Callable[[mx.array], mx.array]]()
    if 0 < config.top_p < 1:
        filters.append(lambda x: sample_utils.apply_top_p(x, config.top_p))
    if config.min_p:
        filters.append(lambda x: sample_utils.apply_min_p(x, config.min_p))
    if config.top_k:
        filters.append(lambda x: sample_utils.apply_top_k(x, config.top_k))
    return filters
