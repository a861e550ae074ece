"""From settings to a choice of the next token: greedy is ours, the rest mlx-lm's."""

from collections.abc import Callable

import mlx.core as mx

from internvl3_mlx.generation.generation_config import GenerationConfig

Sampler = Callable[[mx.array, mx.array], mx.array]  # all ids so far (L,), logits (1, vocab) -> (1,)


def make_sampler(settings: GenerationConfig) -> Sampler:
    """Build the sampler. Importing mlx-lm takes seconds, so greedy decoding never does."""
    if settings.seed is not None:
        mx.random.seed(settings.seed)
    plain = settings.temperature == 0 and settings.repetition_penalty in (None, 1.0)
    return greedy if plain else random_sampler(settings)


def greedy(_: mx.array, logits: mx.array) -> mx.array:
    """Take the likeliest token: no softmax over the vocabulary is needed to know it."""
    return mx.argmax(logits, axis=-1)


def needs_history(settings: GenerationConfig) -> bool:
    return settings.repetition_penalty not in (None, 1.0)


def random_sampler(settings: GenerationConfig) -> Sampler:
    from mlx_lm.sample_utils import make_logits_processors, make_sampler

    sampler = make_sampler(
        temp=settings.temperature, top_p=settings.top_p, min_p=settings.min_p, top_k=settings.top_k
    )
    processors = make_logits_processors(repetition_penalty=settings.repetition_penalty)

    def choose(ids: mx.array, logits: mx.array) -> mx.array:
        for process in processors:
            logits = process(ids, logits)
        wide = logits.astype(mx.float32)
        return sampler(wide - mx.logsumexp(wide, axis=-1, keepdims=True))

    return choose
