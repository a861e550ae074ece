"""Rank given answers by their likelihood after one prompt, which is read once.

The score of a choice is the mean log-probability of its tokens and of the end of the answer: a
whole answer, normalized by its length. Probabilities are the softmax of the scores.
"""

import math
from collections.abc import Sequence
from typing import cast

import mlx.core as mx

from internvl3_mlx.errors import PromptError
from internvl3_mlx.generation.answer import ChoiceScore
from internvl3_mlx.generation.engine import Engine, check_finite
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.sampler import choose_seed
from internvl3_mlx.prompt.answer_tokens import encode_answer
from internvl3_mlx.prompt.tokenizer import Tokenizer


def encode_choices(choices: Sequence[str], tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Encode each choice with the end of the answer; equal ones count once."""
    return {
        choice: [*encode_answer(tokenizer, choice), tokenizer.im_end_id]
        for choice in dict.fromkeys(choices)
    }


def check_choice_length(sequences: dict[str, list[int]], remaining: int) -> None:
    """Raise PromptError for a choice that does not fit into the rest of the context window."""
    for choice, ids in sequences.items():
        if len(ids) > remaining:
            raise PromptError(
                f"the choice {choice[:40]!r} has {len(ids):,} tokens, but only {remaining:,} "
                "positions are left; use shorter choices, a shorter question or fewer tiles"
            )


def score_sequences(
    engine: Engine, logits: mx.array, sequences: Sequence[Sequence[int]]
) -> list[float]:
    """Return the mean log-probability of each sequence's tokens after what the engine has read.

    logits: (1, vocab) of the first token. The engine's cache is left as it was.
    """
    return [mean_log_prob(engine, logits, ids) for ids in sequences]


def mean_log_prob(engine: Engine, logits: mx.array, ids: Sequence[int]) -> float:
    read = [*ids[:-1]]
    rows = logits
    if read:
        rows = mx.concatenate([logits, engine.read_tokens(mx.array([read], dtype=mx.int32))[0]])
        engine.rewind(len(read))
    check_finite(rows)
    wide = rows.astype(mx.float32)
    chosen = mx.take_along_axis(wide, mx.array([*ids])[:, None], axis=-1)[:, 0]
    return float((chosen - mx.logsumexp(wide, axis=-1)).mean().item())  # type: ignore[arg-type]


def rank_choices(scores: Sequence[float], config: GenerationConfig) -> int:
    """Return the index of the chosen one: the most likely, or one drawn at a temperature."""
    if not config.temperature:
        return max(range(len(scores)), key=scores.__getitem__)  # the first of equal ones
    own = mx.random.split(mx.random.key(choose_seed(config)))[1]
    drawn = mx.random.categorical(mx.array([*scores]) / config.temperature, key=own)
    return int(drawn.item())  # type: ignore[arg-type]


def choice_scores(choices: Sequence[str], scores: Sequence[float]) -> tuple[ChoiceScore, ...]:
    """Put scores and probabilities together, in the order of the choices."""
    highest = max(scores)
    weights = [math.exp(score - highest) for score in scores]
    total = cast(float, sum(weights))
    return tuple(
        ChoiceScore(choice, score, weight / total)
        for choice, score, weight in zip(choices, scores, weights, strict=True)
    )
