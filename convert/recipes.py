"""Quantization recipes: which module gets how many bits."""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from internvl3_mlx.checkpoints.build_model import QuantizationChoice
from internvl3_mlx.config import Quantization
from internvl3_mlx.errors import UserError

PROJECTOR_BITS = 8  # every picture passes through mlp1: fewer bits blur all of them
PROJECTOR = re.compile(r"mlp1\.")
VISION = re.compile(r"vision_model\.")
LAYER_INDEX = re.compile(r"\.layers\.(\d+)\.")
BITS = (2, 3, 4, 5, 6, 8)
DEFAULT_GROUP_SIZE = 64


@dataclass(frozen=True)
class QuantizationMode:
    """What MLX packs in one mode: bits and group sizes, the usual ones first."""

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
    """``form`` for the modules whose path matches the pattern ``match``; with ``sensitive`` only
    in the layers that suffer most."""

    pattern: str
    quantization: QuantizationChoice
    sensitive_only: bool = False

    def matches(self, path: str, num_layers: int) -> bool:
        if not fnmatchcase(path, self.pattern):
            return False
        layer = LAYER_INDEX.search(path)
        return (
            not self.sensitive_only
            or layer is None
            or is_sensitive_layer(int(layer[1]), num_layers)
        )


def is_sensitive_layer(layer: int, num_layers: int) -> bool:
    """Tell whether a layer is among those that mixed recipes give more bits: the first and last
    eighth, and every third between."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


@dataclass(frozen=True)
class QuantizationRecipe:
    """``rules`` first, then ``text`` for the language model, ``projector`` (at least 8 bits) and
    ``vision`` for the tower (None: dense). ``depth`` is the language model's."""

    name: str
    text: QuantizationChoice
    projector: QuantizationChoice = Quantization(PROJECTOR_BITS)
    vision: QuantizationChoice = None
    rules: tuple[QuantizationRule, ...] = ()
    num_layers: int = 0

    def choose(self, path: str) -> QuantizationChoice:
        """Say how the module at ``path`` is packed."""
        for rule in self.rules:
            if rule.matches(path, self.num_layers):
                return protect_projector(path, rule.quantization)
        if PROJECTOR.match(path):
            return protect_projector(path, self.projector)
        return self.vision if VISION.match(path) else self.text

    def with_num_layers(self, num_layers: int) -> "QuantizationRecipe":
        return replace(self, num_layers=num_layers)


def protect_projector(path: str, form: QuantizationChoice) -> QuantizationChoice:
    """Give the projector at least PROJECTOR_BITS, whatever a recipe says."""
    if form is None or not PROJECTOR.match(path) or form.bits >= PROJECTOR_BITS:
        return form
    return Quantization(
        PROJECTOR_BITS, form.group_size if form.mode == "affine" else DEFAULT_GROUP_SIZE
    )


def make_quantization(
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
            f"{bits} bits were asked for; MLX packs {format_numbers(known.bits)} in {mode} mode"
        )
    if group_size not in known.group_sizes:
        raise UserError(
            f"a group size of {group_size} was asked for; "
            f"MLX has {format_numbers(known.group_sizes)} in {mode} mode"
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
    """Build the plain recipe: the language model at ``bits``, the projector at 8 bits, the tower
    dense or at ``vision`` bits."""
    text = make_quantization(bits, group_size, mode)
    own_group = text.group_size if mode == "affine" else DEFAULT_GROUP_SIZE
    name = f"{text.bits}bit" if mode == "affine" else mode
    return QuantizationRecipe(
        name if vision_bits is None else f"{name}-v{vision_bits}",
        text,
        Quantization(PROJECTOR_BITS, own_group),
        None if vision_bits is None else make_quantization(vision_bits, own_group),
    )


# name -> bits of most modules, bits of what suffers most: head, embeddings, and in some layers the
# values and the way down, as llama.cpp's K-quants and mlx-lm choose them
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
    """Build a named mix of two widths."""
    if name not in MIXED_RECIPES:
        raise UserError(f"recipe {name!r} was asked for; known are {', '.join(MIXED_RECIPES)}")
    low, high = MIXED_RECIPES[name]
    plain = uniform_recipe(low, group_size, vision_bits=vision_bits)
    most = make_quantization(high, group_size)
    rules = tuple(
        QuantizationRule(match, most, sensitive) for match, sensitive in SENSITIVE_PATTERNS
    )
    suffix = "" if vision_bits is None else f"-v{vision_bits}"
    return replace(plain, name=name + suffix, rules=rules)


RECIPE_KEYS = ("name", "text", "projector", "vision", "modules")
QUANTIZATION_KEYS = ("bits", "group_size", "mode", "layers")
LAYER_CHOICES = ("all", "sensitive")
DENSE = "dense"


def read_recipe(path: Path) -> QuantizationRecipe:
    """Read a recipe file. Raises UserError that names the file and the key."""
    content = read_yaml(path, f"the keys {', '.join(RECIPE_KEYS)}")
    check_keys(content, RECIPE_KEYS, str(path))
    if "text" not in content:
        raise UserError(f"{path} lacks text, the bits of the language model")
    projector = parse_quantization(content.get("projector", PROJECTOR_BITS), f"{path}: projector")
    if projector is not None and projector.bits < PROJECTOR_BITS:
        raise UserError(
            f"{path}: projector {projector.bits}; the projector takes {PROJECTOR_BITS} bits or "
            "dense, for every picture passes through it"
        )
    return QuantizationRecipe(
        name=str(content.get("name", path.stem)),
        text=parse_quantization(content["text"], f"{path}: text"),
        projector=projector,
        vision=parse_quantization(content.get("vision", DENSE), f"{path}: vision"),
        rules=tuple(parse_rules(content.get("modules") or {}, path)),
    )


def read_yaml(path: Path, wanted: str) -> Mapping[str, Any]:
    """Read a YAML file of keys. Raises UserError that says what is ``wanted``, in one line."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"{path} is not YAML: {line}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds no recipe; wanted are {wanted}")
    return content


def parse_rules(table: Any, path: Path) -> Iterable[QuantizationRule]:
    if not isinstance(table, Mapping):
        raise UserError(f"{path}: modules wants a table of paths, such as lm_head: 6")
    for match, value in table.items():
        where = f"{path}: modules: {match}"
        layers = value.get("layers", "all") if isinstance(value, Mapping) else "all"
        if layers not in LAYER_CHOICES:
            raise UserError(f"{where}: layers is {layers!r}; known are {', '.join(LAYER_CHOICES)}")
        yield QuantizationRule(str(match), parse_quantization(value, where), layers == "sensitive")


def parse_quantization(value: Any, where: str) -> QuantizationChoice:
    """Read bits, a table of them, or ``dense``."""
    if value is None or value == DENSE:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"bits": value}
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is {value!r}; wanted are bits, a table with bits, or {DENSE}")
    check_keys(value, QUANTIZATION_KEYS, where)
    try:
        return make_quantization(
            value.get("bits"), value.get("group_size"), value.get("mode", "affine")
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def check_keys(found: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
    names = list(known)
    for key in found:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(names)}"
            raise UserError(f"{where}: no key {key!r}; {hint}")
