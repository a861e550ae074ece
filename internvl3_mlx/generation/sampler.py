"""Samplers: from logits to tokens, as pure functions over the rows of a batch.

What a sampler remembers between two tokens (random keys, the last tokens, how often each was used)
is a ``SamplerState`` of arrays, so that a compiled step can hold it, and every row draws from a key
of its own: an answer has the same tokens alone and in a batch.

Formulas, their order and the draws are mlx-lm's: logit bias, repetition, presence and frequency
penalty; then top-p, min-p and top-k over the log-probabilities; then the temperature. With equal
seeds the tokens are equal, which tests hold, from MLX 0.32.4 on: ``mx.random.categorical`` of
earlier versions draws in another way from the same distribution. Two differences, on purpose:
presence and frequency count the tokens of the answer alone, as OpenAI's API does; and where tokens
tie for the last place of top-k, those of lower id stay, while mlx-lm leaves it to the device.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import mlx.core as mx

from internvl3_mlx.generation.generation_config import GenerationConfig

REPETITION_WINDOW = 20  # tokens that mlx-lm's repetition penalty looks back at
SEED_RANGE = 2**31  # a seed is drawn from it when none is given


@dataclass(frozen=True)
class SamplingParams:
    """How one answer samples; the defaults are greedy decoding.

    top_p from 1, top_k 0 and min_p 0 filter nothing. logit_bias: (token, bias) pairs.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    @classmethod
    def from_config(cls, config: GenerationConfig) -> "SamplingParams":
        return cls(
            temperature=config.temperature,
            top_p=config.top_p if config.top_p > 0 else 1.0,
            top_k=config.top_k,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty or 1.0,
        )

    @property
    def looks_back(self) -> bool:
        """Whether the last tokens of prompt and answer matter."""
        return self.repetition_penalty != 1.0

    @property
    def filters_top_p(self) -> bool:
        return self.top_p < 1

    @property
    def counts_tokens(self) -> bool:
        """Whether it matters how often the answer has a token."""
        return bool(self.frequency_penalty or self.presence_penalty)


class SamplerState(NamedTuple):
    """What B rows remember. A compiled function takes and returns it as a plain tuple.

    keys: (B, 2) uint32, the random keys. history: (B, REPETITION_WINDOW) int32, the last tokens of
    prompt and answer. counts: (B, vocab) float32, how often the answer has each token. What no row
    needs is (B, 0).
    """

    keys: mx.array
    history: mx.array
    counts: mx.array

    def select(self, rows: mx.array) -> "SamplerState":
        """Keep only ``rows``, in that order."""
        return SamplerState(*(array[rows] for array in self))

    def replace_last(self, tokens: mx.array, drawn: mx.array) -> "SamplerState":
        """Remember ``tokens`` (B,) in place of those that were drawn last (B,)."""
        history, counts = self.history, self.counts
        if history.shape[1]:
            history = mx.concatenate([history[:, :-1], tokens[:, None].astype(mx.int32)], axis=1)
        if counts.shape[1]:
            rows = mx.arange(counts.shape[0])
            counts = counts.at[rows, drawn].add(-1.0).at[rows, tokens].add(1.0)
        return SamplerState(self.keys, history, counts)


@dataclass(frozen=True, eq=False)
class Sampler:
    """Chooses the next token of B rows, each by its own ``params``."""

    params: tuple[SamplingParams, ...]

    def init_state(
        self,
        seeds: Sequence[int] = (0,),
        prompt_ids: Sequence[Sequence[int]] = ((),),
        vocab_size: int = 0,
        generated_ids: Sequence[Sequence[int]] | None = None,
    ) -> SamplerState:
        """Return the state in which B answers begin, or go on after ``generated_ids``."""
        answers = generated_ids or [()] * len(seeds)
        keys = [mx.random.key(seed) for seed in seeds]
        if self.is_random:
            keys = [advance(key, len(ids)) for key, ids in zip(keys, answers, strict=True)]
        history, counts = mx.zeros((len(seeds), 0), mx.int32), mx.zeros((len(seeds), 0))
        if self.any("looks_back"):
            both = zip(prompt_ids, answers, strict=True)
            history = mx.array([last_tokens([*prompt, *ids]) for prompt, ids in both], mx.int32)
        if self.any("counts_tokens"):
            counts = mx.stack([count_tokens(ids, vocab_size) for ids in answers])
        return SamplerState(mx.stack(keys), history, counts)

    def __call__(self, logits: mx.array, state: SamplerState) -> tuple[mx.array, SamplerState]:
        """Choose a token for each row: (B, vocab) -> (B,) int32, and the state after it."""
        keys, history, counts = state
        logits = self.change_logits(logits, history, counts)
        tokens = mx.argmax(logits, axis=-1).astype(mx.int32)
        if self.is_random:
            keys, own = split_keys(keys)
            drawn = draw_tokens(self.scores(logits), own)
            tokens = mx.where(self.columns["is_random"][:, 0], drawn, tokens)
        if history.shape[1]:
            history = mx.concatenate([history[:, 1:], tokens[:, None]], axis=1)
        if counts.shape[1]:
            counts = counts.at[mx.arange(tokens.shape[0]), tokens].add(1.0)
        return tokens, SamplerState(keys, history, counts)

    def change_logits(self, logits: mx.array, history: mx.array, counts: mx.array) -> mx.array:
        """Apply logit bias and penalties in the dtype of the logits, (B, vocab)."""
        columns, dtype = self.columns, logits.dtype
        if self.any("logit_bias"):
            rows, ids, values = self.biases
            logits = logits.at[rows, ids].add(values.astype(dtype))
        if history.shape[1]:
            penalty = columns["repetition_penalty"].astype(dtype)
            chosen = mx.take_along_axis(logits, history, axis=-1)
            chosen = mx.where(chosen < 0, chosen * penalty, chosen / penalty)
            logits = mx.put_along_axis(logits, history, chosen, axis=-1)
        if counts.shape[1]:
            presence = (counts > 0) * columns["presence_penalty"]
            frequency = counts * columns["frequency_penalty"]
            logits = logits - presence.astype(dtype) - frequency.astype(dtype)
        return logits

    def scores(self, logits: mx.array) -> mx.array:
        """Return what tokens are drawn by: its softmax is their distribution, (B, vocab)."""
        wide = logits.astype(mx.float32)
        log_probs = self.filter_candidates(wide - mx.logsumexp(wide, axis=-1, keepdims=True))
        return log_probs * self.columns["inverse_temperature"]

    def filter_candidates(self, log_probs: mx.array) -> mx.array:
        """Set to -inf what top-p, min-p and top-k drop, with at most one sort: (B, vocab)."""
        columns, vocab_size = self.columns, log_probs.shape[-1]
        filtered, ranked = log_probs, None
        if self.any("filters_top_p"):
            ranked = mx.sort(log_probs, axis=-1)
            threshold = top_p_threshold(ranked, columns["top_p"])
            filtered = mx.where(filtered < threshold, -mx.inf, filtered)
        if self.any("min_p"):
            threshold = mx.max(log_probs, axis=-1, keepdims=True) + columns["log_min_p"]
            filtered = mx.where(filtered < threshold, -mx.inf, filtered)
        widest = max(params.top_k for params in self.params)
        if widest and min(params.top_k or vocab_size for params in self.params) < vocab_size:
            if ranked is None:
                ranked = mx.sort(mx.topk(log_probs, min(widest, vocab_size), axis=-1), axis=-1)
            filtered = keep_top_k(filtered, ranked, columns["top_k"])
        return filtered

    def select(self, rows: Sequence[int]) -> "Sampler":
        """Keep only ``rows``, in that order."""
        return Sampler(tuple(self.params[row] for row in rows))

    def any(self, name: str) -> bool:
        """Return whether a parameter or property is set for any row."""
        return any(getattr(params, name) for params in self.params)

    @property
    def is_random(self) -> bool:
        return self.any("temperature")

    @cached_property
    def columns(self) -> dict[str, mx.array]:
        """The parameters as arrays: (B, 1), or (1, 1) where all rows have the same."""
        rows = self.params if len({*self.params}) > 1 else self.params[:1]
        values = {name: [of(params) for params in rows] for name, of in COLUMNS.items()}
        return {name: mx.array([[n] for n in column]) for name, column in values.items()}

    @cached_property
    def biases(self) -> tuple[mx.array, mx.array, mx.array]:
        """All logit biases as rows, token ids and values, (N,) each."""
        found = [
            (row, token, bias)
            for row, params in enumerate(self.params)
            for token, bias in params.logit_bias
        ]
        rows, ids, values = zip(*found, strict=True)
        return mx.array(rows), mx.array(ids), mx.array(values, mx.float32)


GREEDY = Sampler((SamplingParams(),))
COLUMNS: dict[str, Callable[[SamplingParams], float]] = {
    "is_random": lambda params: params.temperature > 0,
    "inverse_temperature": lambda params: 1.0 / params.temperature if params.temperature else 1.0,
    "top_p": lambda params: params.top_p,
    "log_min_p": lambda params: math.log(params.min_p) if params.min_p else -math.inf,
    "top_k": lambda params: params.top_k,
    "repetition_penalty": lambda params: params.repetition_penalty,
    "presence_penalty": lambda params: params.presence_penalty,
    "frequency_penalty": lambda params: params.frequency_penalty,
}


def top_p_threshold(ranked: mx.array, top_p: mx.array) -> mx.array:
    """Return the lowest log-probability of the nucleus, (B, 1); -inf for rows without top-p.

    ranked: log-probabilities, ascending (B, vocab).
    """
    probs = mx.exp(ranked)
    mass_above = mx.cumsum(probs, axis=-1, reverse=True, inclusive=False)
    total = mass_above[:, :1] + probs[:, :1]
    num_dropped = (mass_above >= top_p * total).sum(axis=-1, keepdims=True)
    return mx.where(top_p < 1, mx.take_along_axis(ranked, num_dropped, axis=-1), -mx.inf)


def keep_top_k(log_probs: mx.array, ranked: mx.array, top_k: mx.array) -> mx.array:
    """Set to -inf what is not among the first ``top_k`` (B, 1) of a row, in rows that have one.

    ranked: at least the top_k highest log-probabilities before other filters, ascending (B, N).
    Of equal ones the first are kept.
    """
    place = mx.clip(ranked.shape[-1] - top_k, 0, ranked.shape[-1] - 1)
    last = mx.take_along_axis(ranked, mx.broadcast_to(place, (ranked.shape[0], 1)), axis=-1)
    above, ties = log_probs > last, log_probs == last
    num_ties = top_k - above.sum(axis=-1, keepdims=True)
    kept = above | (ties & (mx.cumsum(ties.astype(mx.int32), axis=-1) <= num_ties))
    return mx.where(kept | (top_k == 0), log_probs, -mx.inf)


def draw_tokens(scores: mx.array, keys: mx.array) -> mx.array:
    """Draw a token of each row by the softmax of its scores: (B, vocab), keys (B, 2) -> (B,).

    By inversion: one random number for each row, as ``mx.random.categorical`` draws from one row.
    It takes no array of keys, and draws otherwise from several rows.
    """
    weights = mx.exp(scores - mx.max(scores, axis=-1, keepdims=True))
    below = mx.cumsum(weights, axis=-1, inclusive=False)
    target = uniform(keys) * mx.sum(weights, axis=-1, keepdims=True)
    return mx.sum(below <= target, axis=-1).astype(mx.int32) - 1


def uniform(keys: mx.array) -> mx.array:
    """Draw one number from [0, 1) with each key: (B, 2) -> (B, 1) float32."""
    return mx.vmap(lambda key: mx.random.uniform(shape=(1,), key=key))(keys)


def split_keys(keys: mx.array) -> tuple[mx.array, mx.array]:
    """Split each key as MLX splits its global one: the next key, and one to draw with. (B, 2)."""
    pairs = mx.vmap(mx.random.split)(keys)
    return pairs[:, 0], pairs[:, 1]


def advance(key: mx.array, count: int) -> mx.array:
    """Return the key after ``count`` tokens."""
    for _ in range(count):
        key = mx.random.split(key)[0]
    return key


def last_tokens(ids: Sequence[int]) -> list[int]:
    """Return the window of the repetition penalty.

    Where there are fewer tokens, the first one is repeated: that changes nothing, and it leaves
    the window in time.
    """
    window = [*ids[-REPETITION_WINDOW:]]
    return [window[0]] * (REPETITION_WINDOW - len(window)) + window


def count_tokens(ids: Sequence[int], vocab_size: int) -> mx.array:
    """Count each token: (vocab,) float32."""
    return mx.zeros(vocab_size).at[mx.array([*ids], mx.int32)].add(1.0)


def join_states(states: Sequence[SamplerState]) -> SamplerState:
    """Put the states of single rows together; zeros where one needs nothing that another needs."""
    return SamplerState(*(mx.concatenate(pad_rows(arrays)) for arrays in zip(*states, strict=True)))


def pad_rows(arrays: Sequence[mx.array]) -> list[mx.array]:
    """Widen arrays (1, N) without columns to the width of the others, with zeros."""
    width = max(array.shape[1] for array in arrays)
    return [a if a.shape[1] == width else mx.zeros((1, width), a.dtype) for a in arrays]


def split_state(state: SamplerState, params: Sequence[SamplingParams]) -> list[SamplerState]:
    """Return the state of each row, with what it needs itself."""
    columns = [mx.split(array, len(params)) for array in state]
    rows = [SamplerState(*parts) for parts in zip(*columns, strict=True)]
    return [
        SamplerState(
            row.keys,
            row.history if own.looks_back else row.history[:, :0],
            row.counts if own.counts_tokens else row.counts[:, :0],
        )
        for row, own in zip(rows, params, strict=True)
    ]


def choose_seed(config: GenerationConfig) -> int:
    """Return the seed of one answer: its own, or one from MLX's global random numbers."""
    if config.seed is not None or not config.temperature:
        return config.seed or 0
    return int(mx.random.randint(0, SEED_RANGE).item())  # type: ignore[arg-type]
