"""The settings of reinforcement learning with verifiable rewards (GRPO, GSPO)."""

from dataclasses import dataclass

from internvl3_mlx.option_fields import config_field
from internvl3_mlx.training.config_fields import IMPORTANCE_LEVELS

SECTION = "GRPO"


@dataclass(frozen=True, kw_only=True)
class GRPOSettings:
    """How answers are sampled and rewarded, and how the policy learns from them."""

    reward: str | None = config_field(
        None,
        SECTION,
        "What an answer is worth: exact, relaxed, anls, iou, regex, or a function of yours.",
        metavar="NAME|FILE.py:FUNCTION",
    )
    num_generations: int = config_field(
        8, SECTION, "Answers sampled to each prompt: the group.", low=2, high=256
    )
    max_completion_length: int = config_field(
        256, SECTION, "The most tokens of a sampled answer.", low=1
    )
    importance_level: str = config_field(
        "token",
        SECTION,
        "Ratio of new to old probability: of each token (GRPO) or of the sequence (GSPO).",
        choices=IMPORTANCE_LEVELS,
    )
    num_iterations: int = config_field(
        1, SECTION, "Updates that learn from the same sampled answers.", low=1
    )
    epsilon: float = config_field(0.2, SECTION, "How far the ratio may fall below 1.", low=0)
    epsilon_high: float | None = config_field(
        None, SECTION, "How far the ratio may rise above 1.", low=0, default_text="--epsilon"
    )
