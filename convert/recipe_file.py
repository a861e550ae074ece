"""Quantization recipes from YAML. Every key is known or refused, with the nearest known name.

name: mine
text: 4                       # bits, or {bits, group_size, mode}, or dense
projector: 8
vision: dense
modules:                      # by path, * for anything; the first match decides
  language_model.lm_head: 6
  "*.down_proj": {bits: 6, layers: sensitive}
  "*.o_proj": dense
"""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from internvl3_mlx.convert.recipes import PROJECTOR_BITS, Choice, Recipe, Rule, packing
from internvl3_mlx.errors import UserError

KEYS = ("name", "text", "projector", "vision", "modules")
FORM_KEYS = ("bits", "group_size", "mode", "layers")
LAYERS = ("all", "sensitive")
DENSE = "dense"


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file. Raises UserError that names the file and the key."""
    content = read_yaml(path, f"the keys {', '.join(KEYS)}")
    check_keys(content, KEYS, str(path))
    if "text" not in content:
        raise UserError(f"{path} lacks text, the bits of the language model")
    projector = read_form(content.get("projector", PROJECTOR_BITS), f"{path}: projector")
    if projector is not None and projector.bits < PROJECTOR_BITS:
        raise UserError(
            f"{path}: projector {projector.bits}; the projector takes {PROJECTOR_BITS} bits or "
            "dense, for every picture passes through it"
        )
    return Recipe(
        name=str(content.get("name", path.stem)),
        text=read_form(content["text"], f"{path}: text"),
        projector=projector,
        vision=read_form(content.get("vision", DENSE), f"{path}: vision"),
        rules=tuple(read_rules(content.get("modules") or {}, path)),
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


def read_rules(table: Any, path: Path) -> Iterable[Rule]:
    if not isinstance(table, Mapping):
        raise UserError(f"{path}: modules wants a table of paths, such as lm_head: 6")
    for match, value in table.items():
        where = f"{path}: modules: {match}"
        layers = value.get("layers", "all") if isinstance(value, Mapping) else "all"
        if layers not in LAYERS:
            raise UserError(f"{where}: layers is {layers!r}; known are {', '.join(LAYERS)}")
        yield Rule(str(match), read_form(value, where), layers == "sensitive")


def read_form(value: Any, where: str) -> Choice:
    """Read bits, a table of them, or ``dense``."""
    if value is None or value == DENSE:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"bits": value}
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is {value!r}; wanted are bits, a table with bits, or {DENSE}")
    check_keys(value, FORM_KEYS, where)
    try:
        return packing(value.get("bits"), value.get("group_size"), value.get("mode", "affine"))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def check_keys(found: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
    names = list(known)
    for key in found:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(names)}"
            raise UserError(f"{where}: no key {key!r}; {hint}")
