"""The training objectives by the name of their method."""

from collections.abc import Callable

from internvl3_mlx.training.grpo import GRPO
from internvl3_mlx.training.objectives import KTO, MPO, SFT, Distillation, Objective

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "sft": SFT,
    "prm": lambda **options: SFT(name="prm", **options),
    "pretrain": lambda **options: SFT(name="pretrain", **options),
    "mpo": MPO,
    "dpo": lambda **options: MPO(name="dpo", **options),
    "orpo": lambda **options: MPO(name="orpo", **options),
    "simpo": lambda **options: MPO(name="simpo", **options),
    "kto": KTO,
    "grpo": GRPO,
    "distill": Distillation,
}
