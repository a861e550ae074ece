"""Quantization recipes: which module gets how many bits."""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import mlx.nn as nn

from internvl3_mlx.config import Quantization
from internvl3_mlx.errors import UserError

Choice = Quantization | None  # None: stays dense

PROJECTOR_BITS = 8  # every picture passes through mlp1: fewer bits blur all of them
PROJECTOR = re.compile(r"mlp1\.")
TOWER = re.compile(r"vision_model\.")
LAYER = re.compile(r"\.layers\.(\d+)\.")
BITS = (2, 3, 4, 5, 6, 8)
DEFAULT_GROUP = 64


@dataclass(frozen=True)
class Mode:
    """What MLX packs in one mode: bits and group sizes, the usual ones first."""

    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]


MODES = {
    "affine": Mode((4, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": Mode((4,), (32,)),
    "mxfp8": Mode((8,), (32,)),
    "nvfp4": Mode((4,), (16,)),
}


@dataclass(frozen=True)
class Rule:
    """``form`` for the modules whose path matches the pattern ``match``; with ``sensitive`` only
    in the layers that suffer most."""

    match: str
    form: Choice
    sensitive: bool = False

    def covers(self, path: str, depth: int) -> bool:
        if not fnmatchcase(path, self.match):
            return False
        layer = LAYER.search(path)
        return not self.sensitive or layer is None or is_sensitive(int(layer[1]), depth)


def is_sensitive(layer: int, depth: int) -> bool:
    """Tell whether a layer is among those that mixed recipes give more bits: the first and last
    eighth, and every third between."""
    eighth = depth // 8
    return layer < eighth or layer >= 7 * depth // 8 or (layer - eighth) % 3 == 2


@dataclass(frozen=True)
class Recipe:
    """``rules`` first, then ``text`` for the language model, ``projector`` (at least 8 bits) and
    ``vision`` for the tower (None: dense). ``depth`` is the language model's."""

    name: str
    text: Choice
    projector: Choice = Quantization(PROJECTOR_BITS)
    vision: Choice = None
    rules: tuple[Rule, ...] = ()
    depth: int = 0

    def choose(self, path: str) -> Choice:
        """Say how the module at ``path`` is packed."""
        for rule in self.rules:
            if rule.covers(path, self.depth):
                return spared(path, rule.form)
        if PROJECTOR.match(path):
            return spared(path, self.projector)
        return self.vision if TOWER.match(path) else self.text

    def for_depth(self, depth: int) -> "Recipe":
        return replace(self, depth=depth)


def spared(path: str, form: Choice) -> Choice:
    """Give the projector at least PROJECTOR_BITS, whatever a recipe says."""
    if form is None or not PROJECTOR.match(path) or form.bits >= PROJECTOR_BITS:
        return form
    return Quantization(PROJECTOR_BITS, form.group_size if form.mode == "affine" else DEFAULT_GROUP)


def packing(
    bits: int | None = None, group_size: int | None = None, mode: str = "affine"
) -> Quantization:
    """Check one packing; what is left out takes the mode's usual value."""
    if mode not in MODES:
        raise UserError(f"mode {mode!r} was asked for; MLX has {', '.join(MODES)}")
    known = MODES[mode]
    bits = known.bits[0] if bits is None else bits
    group_size = known.group_sizes[0] if group_size is None else group_size
    if bits not in known.bits:
        raise UserError(
            f"{bits} bits were asked for; MLX packs {numbers(known.bits)} in {mode} mode"
        )
    if group_size not in known.group_sizes:
        raise UserError(
            f"a group size of {group_size} was asked for; "
            f"MLX has {numbers(known.group_sizes)} in {mode} mode"
        )
    return Quantization(bits, group_size, mode)


def numbers(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, sorted(values)))


def recipe(
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    *,
    vision: int | None = None,
) -> Recipe:
    """Build the plain recipe: the language model at ``bits``, the projector at 8 bits, the tower
    dense or at ``vision`` bits."""
    text = packing(bits, group_size, mode)
    own_group = text.group_size if mode == "affine" else DEFAULT_GROUP
    name = f"{text.bits}bit" if mode == "affine" else mode
    return Recipe(
        name if vision is None else f"{name}-v{vision}",
        text,
        Quantization(PROJECTOR_BITS, own_group),
        None if vision is None else packing(vision, own_group),
    )


# name -> bits of most modules, bits of what suffers most: head, embeddings, and in some layers the
# values and the way down, as llama.cpp's K-quants and mlx-lm choose them
MIXES: Mapping[str, tuple[int, int]] = {
    "mixed_2_6": (2, 6),
    "mixed_3_4": (3, 4),
    "mixed_3_5": (3, 5),
    "mixed_3_6": (3, 6),
    "mixed_4_6": (4, 6),
    "mixed_4_8": (4, 8),
}
SUFFERING = (  # pattern, whether only in the sensitive layers
    ("language_model.model.layers.*.v_proj", True),
    ("language_model.model.layers.*.down_proj", True),
    ("language_model.model.embed_tokens", False),
    ("language_model.lm_head", False),
)


def mixed(name: str, group_size: int | None = None, *, vision: int | None = None) -> Recipe:
    """Build a named mix of two widths."""
    if name not in MIXES:
        raise UserError(f"recipe {name!r} was asked for; known are {', '.join(MIXES)}")
    low, high = MIXES[name]
    plain = recipe(low, group_size, vision=vision)
    most = packing(high, group_size)
    rules = tuple(Rule(match, most, sensitive) for match, sensitive in SUFFERING)
    suffix = "" if vision is None else f"-v{vision}"
    return replace(plain, name=name + suffix, rules=rules)


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
