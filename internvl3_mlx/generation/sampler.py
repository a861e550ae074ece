"""From the generation config to a sampler: greedy is ours, the others are mlx-lm's."""

from collections.abc import Callable

import mlx.core as mx

from internvl3_mlx.generation.generation_config import GenerationConfig

# ids so far (L,), logits (1, vocab) -> the next token (1,)
Sampler = Callable[[mx.array, mx.array], mx.array]


def make_sampler(config: GenerationConfig) -> Sampler:
    """Build the sampler. Importing mlx-lm takes seconds, so greedy decoding never does."""
    if config.seed is not None:
        mx.random.seed(config.seed)
    is_greedy = config.temperature == 0 and not needs_history(config)
    return greedy if is_greedy else random_sampler(config)


def greedy(_: mx.array, logits: mx.array) -> mx.array:
    """Choose the most likely token; that takes no softmax over the vocabulary."""
    return mx.argmax(logits, axis=-1)


def needs_history(config: GenerationConfig) -> bool:
    """Tell whether the sampler looks back at the ids: only the repetition penalty does."""
    return config.repetition_penalty not in (None, 1.0)


def random_sampler(config: GenerationConfig) -> Sampler:
    """Build mlx-lm's sampler behind its logits processors."""
    from mlx_lm import sample_utils

    sample = sample_utils.make_sampler(
        temp=config.temperature, top_p=config.top_p, min_p=config.min_p, top_k=config.top_k
    )
    processors = sample_utils.make_logits_processors(repetition_penalty=config.repetition_penalty)

    def choose(ids: mx.array, logits: mx.array) -> mx.array:
        for process in processors:
            logits = process(ids, logits)
        wide = logits.astype(mx.float32)
        return sample(wide - mx.logsumexp(wide, axis=-1, keepdims=True))

    return choose
