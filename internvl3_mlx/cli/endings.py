"""How an answer ended: whether it was cut, is empty, or does not satisfy its constraint."""

import json
from typing import TYPE_CHECKING

from internvl3_mlx.errors import InternVL3Error

if TYPE_CHECKING:
    from internvl3_mlx.generation.answer import Answer
    from internvl3_mlx.generation.generation_config import GenerationConfig

EMPTY = "the answer is empty"
CONTEXT_FULL = "the answer was cut: the context window is full"
FLAG, SETTING = "-m N", "/set max-tokens N"  # how to allow more tokens


def describe_ending(answer: "Answer", config: "GenerationConfig", how: str) -> str | None:
    """Say that an answer was cut or is empty; None where it ended by itself.

    how: what allows more tokens, ``FLAG`` or ``SETTING``.
    """
    if answer.finish_reason == "length":
        return describe_cut(answer, config, how)
    return None if answer.text.strip() else EMPTY


def describe_cut(answer: "Answer", config: "GenerationConfig", how: str) -> str:
    count = answer.usage.completion_tokens
    if count < config.max_tokens:
        return CONTEXT_FULL
    return f"the answer was cut at {count:,} token{'s' * (count != 1)}; {how} allows more"


def require_complete(answer: "Answer", config: "GenerationConfig", how: str = FLAG) -> "Answer":
    """Return ``answer``; raise InternVL3Error if it was cut before its constraint was satisfied."""
    if answer.finish_reason == "length" and not satisfies_constraint(answer.text, config):
        raise InternVL3Error(f"incomplete structured output: {describe_cut(answer, config, how)}")
    return answer


def satisfies_constraint(text: str, config: "GenerationConfig") -> bool:
    """Tell whether a text that was cut satisfies its constraint all the same, as digits may."""
    if config.json_schema is not None:
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            return False
    if config.regex:
        from internvl3_mlx.generation.structured import matches_regex

        return matches_regex(config.regex, text)
    return not config.choice or text in config.choice
