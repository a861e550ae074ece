"""Quantization recipes: which module gets how many bits. Tables over module paths; the first match
decides."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import mlx.nn as nn

from internvl3_mlx.config import Quantization
from internvl3_mlx.errors import UserError

Choice = Quantization | None  # None: stays dense

PROJECTOR_BITS = 8  # every picture passes through mlp1: fewer bits blur all of them
PROJECTOR = re.compile(r"mlp1\.")
TOWER = re.compile(r"vision_model\.")
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Recipe:
    """``text`` for the language model, at least 8 bits for the projector, ``vision`` for the tower
    (None: dense)."""

    name: str
    text: Quantization
    projector: Quantization = Quantization(PROJECTOR_BITS)
    vision: Choice = None

    def choose(self, path: str) -> Choice:
        """Say how the module at ``path`` is packed."""
        if PROJECTOR.match(path):
            return self.projector
        if TOWER.match(path):
            return self.vision
        return self.text


def recipe(bits: int, group_size: int = 64) -> Recipe:
    """Build the plain recipe: the language model at ``bits``, the tower dense, the projector at 8
    bits."""
    if bits not in BITS:
        raise UserError(f"{bits} bits were asked for; MLX packs {', '.join(map(str, BITS))}")
    if group_size not in GROUP_SIZES:
        raise UserError(
            f"a group size of {group_size} was asked for; "
            f"MLX has {', '.join(map(str, GROUP_SIZES))}"
        )
    return Recipe(
        f"{bits}bit", Quantization(bits, group_size), Quantization(PROJECTOR_BITS, group_size)
    )


def fitting(choose: Callable[[str], Choice]) -> Callable[[str, nn.Module], Choice]:
    """Restrict a choice to modules that can be packed: widths that part into groups."""

    def choice(path: str, module: nn.Module) -> Choice:
        chosen = choose(path) if hasattr(module, "to_quantized") else None
        return chosen if chosen and module.weight.shape[-1] % chosen.group_size == 0 else None

    return choice


def predicate(choose: Callable[[str], Choice]) -> Callable[[str, nn.Module], bool | dict[str, Any]]:
    """Say the same to ``mlx.nn.quantize``."""
    fits = fitting(choose)

    def asked(path: str, module: nn.Module) -> bool | dict[str, Any]:
        chosen = fits(path, module)
        return asdict(chosen) if chosen else False

    return asked
