"""Quantization recipes: which module gets how many bits."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from internvl3_mlx.checkpoints.build_model import QuantizationChoice
from internvl3_mlx.config import Quantization
from internvl3_mlx.errors import UserError
from internvl3_mlx.files import check_keys, did_you_mean
from internvl3_mlx.yaml_files import read_yaml

PROJECTOR_BITS = 8  # every image passes through mlp1 or mlp2: fewer bits would degrade all of them
PROJECTOR = re.compile(r"mlp[12]\.")
VISION = re.compile(r"vision_model\.")
# Flash's router and those of experts: small, and a wrong digit takes another way through the model
ROUTER = re.compile(r"(?:pooling_before_gating|gating)\.|language_model\..*\.mlp\.(?:gate|router)$")
LAYER_INDEX = re.compile(r"\.layers\.(\d+)\.")
BITS = (2, 3, 4, 5, 6, 8)
DEFAULT_GROUP_SIZE = 64
MAX_PATTERNS, MAX_PATTERN = 1_000, 200  # of a recipe file, and the characters of one


@dataclass(frozen=True)
class QuantizationMode:
    """The bits and group sizes that MLX supports in one mode, the defaults first."""

    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]


MODES = {
    "affine": QuantizationMode((4, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": QuantizationMode((4,), (32,)),
    "mxfp8": QuantizationMode((8,), (32,)),
    "nvfp4": QuantizationMode((4,), (16,)),
}


@dataclass(frozen=True)
class QuantizationRule:
    """A ``quantization`` for the modules whose path matches ``pattern``; with ``sensitive_only``
    only in the most sensitive layers."""

    pattern: str
    quantization: QuantizationChoice
    sensitive_only: bool = False

    def matches(self, path: str, num_layers: int) -> bool:
        """Return whether the rule applies to the module at ``path``."""
        if not fnmatchcase(path, self.pattern):
            return False
        layer = LAYER_INDEX.search(path)
        return (
            not self.sensitive_only
            or layer is None
            or is_sensitive_layer(int(layer[1]), num_layers)
        )


def is_sensitive_layer(layer: int, num_layers: int) -> bool:
    """Return whether mixed recipes give a layer more bits: the first and the last eighth, and every
    third between, as llama.cpp's K-quants and mlx-lm choose them."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


@dataclass(frozen=True)
class QuantizationRecipe:
    """How many bits each module gets; None leaves modules unquantized.

    The first of ``rules`` that matches decides, else ``text`` (language model), ``projector`` (at
    least 8 bits) or ``vision`` (vision tower). ``num_layers`` is the language model's.
    """

    name: str
    text: QuantizationChoice
    projector: QuantizationChoice = Quantization(PROJECTOR_BITS)
    vision: QuantizationChoice = None
    rules: tuple[QuantizationRule, ...] = ()
    num_layers: int = 0

    def choose(self, path: str) -> QuantizationChoice:
        """Return the quantization of the module at ``path``; a router has none."""
        if ROUTER.match(path):
            return None
        for rule in self.rules:
            if rule.matches(path, self.num_layers):
                return protect_projector(path, rule.quantization)
        if PROJECTOR.match(path):
            return protect_projector(path, self.projector)
        return self.vision if VISION.match(path) else self.text

    def with_num_layers(self, num_layers: int) -> "QuantizationRecipe":
        """Return the recipe for a language model of this depth, which decides the sensitive
        layers."""
        return replace(self, num_layers=num_layers)


def protect_projector(path: str, quantization: QuantizationChoice) -> QuantizationChoice:
    """Give the projector at least PROJECTOR_BITS, whatever a recipe says."""
    if quantization is None or not PROJECTOR.match(path) or quantization.bits >= PROJECTOR_BITS:
        return quantization
    is_affine = quantization.mode == "affine"
    return Quantization(
        PROJECTOR_BITS, quantization.group_size if is_affine else DEFAULT_GROUP_SIZE
    )


def make_quantization(
    bits: int | None = None, group_size: int | None = None, mode: str = "affine"
) -> Quantization:
    """Build a quantization that MLX supports; None takes the mode's default.

    Raises UserError for anything else.
    """
    if mode not in MODES:
        raise UserError(f"unknown mode {mode!r}; {did_you_mean(mode, MODES)}")
    known = MODES[mode]
    bits = known.bits[0] if bits is None else bits
    group_size = known.group_sizes[0] if group_size is None else group_size
    if bits not in known.bits:
        raise UserError(
            f"{bits} bits are not supported in {mode} mode; choose from "
            f"{format_numbers(known.bits)}"
        )
    if group_size not in known.group_sizes:
        raise UserError(
            f"a group size of {group_size} is not supported in {mode} mode; choose from "
            f"{format_numbers(known.group_sizes)}"
        )
    return Quantization(bits, group_size, mode)


def format_numbers(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, sorted(values)))


def uniform_recipe(
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    *,
    vision_bits: int | None = None,
) -> QuantizationRecipe:
    """Build a recipe with one bit width: the language model at ``bits``, the projector at 8 bits,
    the vision tower unquantized or at ``vision_bits``."""
    text = make_quantization(bits, group_size, mode)
    projector_group = text.group_size if mode == "affine" else DEFAULT_GROUP_SIZE
    name = f"{text.bits}bit" if mode == "affine" else mode
    return QuantizationRecipe(
        name if vision_bits is None else f"{name}-v{vision_bits}",
        text,
        Quantization(PROJECTOR_BITS, projector_group),
        None if vision_bits is None else make_quantization(vision_bits, projector_group),
    )


# name -> bits of most modules, bits of the most sensitive ones: output head, embeddings, and v_proj
# and down_proj of the sensitive layers
MIXED_RECIPES: Mapping[str, tuple[int, int]] = {
    "mixed_2_6": (2, 6),
    "mixed_3_4": (3, 4),
    "mixed_3_5": (3, 5),
    "mixed_3_6": (3, 6),
    "mixed_4_6": (4, 6),
    "mixed_4_8": (4, 8),
}
SENSITIVE_PATTERNS = (  # pattern, whether only in the sensitive layers
    ("language_model.model.layers.*.v_proj", True),
    ("language_model.model.layers.*.down_proj", True),
    ("language_model.model.embed_tokens", False),
    ("language_model.lm_head", False),
)


def mixed_recipe(
    name: str, group_size: int | None = None, *, vision_bits: int | None = None
) -> QuantizationRecipe:
    """Build one of MIXED_RECIPES. Raises UserError for an unknown name."""
    if name not in MIXED_RECIPES:
        raise UserError(f"unknown recipe {name!r}; {did_you_mean(name, MIXED_RECIPES)}")
    low, high = MIXED_RECIPES[name]
    plain = uniform_recipe(low, group_size, vision_bits=vision_bits)
    more_bits = make_quantization(high, group_size)
    rules = tuple(
        QuantizationRule(pattern, more_bits, sensitive) for pattern, sensitive in SENSITIVE_PATTERNS
    )
    suffix = "" if vision_bits is None else f"-v{vision_bits}"
    return replace(plain, name=name + suffix, rules=rules)


RECIPE_KEYS = ("name", "text", "projector", "vision", "modules")
QUANTIZATION_KEYS = ("bits", "group_size", "mode", "layers")
LAYER_CHOICES = ("all", "sensitive")
DENSE = "dense"


def read_recipe(path: Path) -> QuantizationRecipe:
    """Read a recipe from a YAML file. Raises UserError that names the file and the key."""
    content = read_yaml(path, f"the keys {', '.join(RECIPE_KEYS)}")
    check_keys(content, RECIPE_KEYS, str(path))
    if "text" not in content:
        raise UserError(
            f"{path} has no key text, the bits of the language model; add one, such as text: 4"
        )
    projector = parse_quantization(content.get("projector", PROJECTOR_BITS), f"{path}: projector")
    if projector is not None and projector.bits < PROJECTOR_BITS:
        raise UserError(
            f"{path}: projector is {projector.bits}, but every image passes through it; "
            f"write {PROJECTOR_BITS} bits or {DENSE}"
        )
    return QuantizationRecipe(
        name=str(content.get("name", path.stem)),
        text=parse_quantization(content["text"], f"{path}: text"),
        projector=projector,
        vision=parse_quantization(content.get("vision", DENSE), f"{path}: vision"),
        rules=tuple(parse_rules(content.get("modules") or {}, path)),
    )


def parse_rules(table: Any, path: Path) -> Iterable[QuantizationRule]:
    """Yield the rules of a recipe's ``modules``, in order."""
    if not isinstance(table, Mapping):
        raise UserError(
            f"{path}: modules is not a mapping; write one line per pattern, such as lm_head: 6"
        )
    if len(table) > MAX_PATTERNS or max(map(len, map(str, table)), default=0) > MAX_PATTERN:
        raise UserError(
            f"{path}: modules has more than {MAX_PATTERNS:,} patterns, or one of more than "
            f"{MAX_PATTERN} characters; write fewer or shorter ones with *"
        )
    for pattern, value in table.items():
        where = f"{path}: modules: {pattern}"
        layers = value.get("layers", "all") if isinstance(value, Mapping) else "all"
        if layers not in LAYER_CHOICES:
            raise UserError(
                f"{where}: layers is {layers!r}; choose from {', '.join(LAYER_CHOICES)}"
            )
        yield QuantizationRule(
            str(pattern), parse_quantization(value, where), layers == "sensitive"
        )


def parse_quantization(value: Any, where: str) -> QuantizationChoice:
    """Parse bits, a mapping with bits, or ``dense``."""
    if value is None or value == DENSE:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"bits": value}
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is {value!r}; write bits, a mapping with bits, or {DENSE}")
    check_keys(value, QUANTIZATION_KEYS, where)
    try:
        return make_quantization(
            value.get("bits"), value.get("group_size"), value.get("mode", "affine")
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
