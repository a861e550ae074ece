"""Candidates for best-of-N: the greedy answer and sampled ones, over a prompt that is read once.

The settings are those of VLMEvalKit's best-of-8: candidate 0 greedy, the others at temperature 0.6
with top-p 0.95. Candidate i samples with seed + i, so that a set can be repeated.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

from internvl3_mlx.errors import UserError
from internvl3_mlx.generation.answer import Answer
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.parallel_samples import can_sample_together, stream_samples
from internvl3_mlx.generation.processor import ModelInputs
from internvl3_mlx.generation.prompt_cache import PromptCache
from internvl3_mlx.generation.runner import ModelRunner

BEST_OF_DEFAULTS: Mapping[str, float | int] = MappingProxyType(
    {"temperature": 0.6, "top_p": 0.95, "max_tokens": 4096, "seed": 0}
)


def candidate_configs(config: GenerationConfig, count: int) -> list[GenerationConfig]:
    """Return how each candidate samples: the first greedily. Raises UserError without a seed."""
    if count < 1:
        raise UserError(f"n is {count}; ask for at least one candidate")
    if config.seed is None:
        raise UserError("best-of-N needs a seed, so that its candidates can be repeated")
    if count > 1 and not config.temperature:
        raise UserError(
            "at temperature 0 all candidates are the same; set temperature above 0 (the published "
            "one is 0.6), or drop it"
        )
    greedy = replace(config, temperature=0.0)
    sampled = (replace(config, seed=config.seed + index) for index in range(1, count))
    return [greedy, *sampled]


def check_log_probs(config: GenerationConfig) -> None:
    """Raise UserError where the log-probabilities of answers cannot be measured."""
    if not can_sample_together(config):
        raise UserError(
            "choosing by log-probability needs answers that are decoded together; drop structured "
            "output, choice, lookup and draft_model, or choose by vote or with a critic"
        )


def write_candidates(
    runner: ModelRunner,
    inputs: ModelInputs,
    config: GenerationConfig,
    count: int,
    cache: PromptCache | None = None,
    *,
    log_probs: bool = False,
) -> Iterator[tuple[int, Answer]]:
    """Yield the candidates with their indices, as each ends."""
    if config.lookup or config.draft_model is not None:
        raise UserError("best-of-N samples its answers; drop lookup and draft_model")
    if log_probs:
        check_log_probs(config)
    configs = candidate_configs(config, count)
    return stream_samples(runner, inputs, configs, cache, log_probs=log_probs)
