"""The user's configuration file: defaults for the flags of ``chat`` and ``generate``, and aliases.

A flag wins over the environment, the environment over an alias, an alias over the file's own
defaults. The adapter of the file belongs to its model and is ignored where another is named.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from internvl3_mlx.errors import UserError
from internvl3_mlx.files import CACHE_NAME, atomic_write, did_you_mean
from internvl3_mlx.user_paths import expand_user, home_folder, read_small_file
from internvl3_mlx.yaml_files import read_yaml

CONFIG_VARIABLE = "INTERNVL3_CONFIG"  # os.devnull for no file
CONFIG_NAME = "config.yaml"
ALIASES = "aliases"
WITH_SETTINGS = ("chat", "generate")  # commands that take all settings; others take the model
EXPECTED = "settings such as model: 2b"


def config_path() -> Path:
    """Return the file that $INTERNVL3_CONFIG names, or that in the user's folder of settings."""
    if named := os.environ.get(CONFIG_VARIABLE):
        return expand_user(named)
    base = Path(os.environ.get("XDG_CONFIG_HOME") or "")
    try:
        base = base if base.is_absolute() else home_folder() / ".config"
    except UserError:  # no home folder, so no file in it
        return Path(os.devnull)
    return base / CACHE_NAME / CONFIG_NAME


def setting_types() -> dict[str, type]:
    """Return the type of each setting by its key, which is the flag's long name."""
    from internvl3_mlx.cli.generation_fields import GENERATION_FIELDS, PARSERS

    simple = {
        param_key(name): kind
        for name, (kind, _) in GENERATION_FIELDS.items()
        if kind is not bool and name not in PARSERS and name != "stop"
    }
    return {"model": str, "adapter": str, **simple}


def canonical_key(key: object) -> object:
    """Return the key of a setting by any spelling of its flag, such as temp; others as they are."""
    from internvl3_mlx.cli.generation_fields import setting_names

    spelled = str(key).lstrip("-").replace("_", "-")
    field, is_plain = setting_names().get(spelled, ("", False))
    return param_key(field) if is_plain and param_key(field) in setting_types() else key


def read_config(*, may_be_missing: bool = False) -> dict[str, Any]:
    """Read and check the file; without one, there are no settings.

    may_be_missing: accept that the file of $INTERNVL3_CONFIG does not exist yet.

    Raises UserError for an unknown key or a wrong value.
    """
    path = config_path()
    if not path.exists():
        if os.environ.get(CONFIG_VARIABLE) and not may_be_missing:
            raise UserError(
                f"no file {path}, which {CONFIG_VARIABLE} names; correct or unset the variable"
            )
        return {}
    if not path.is_file() and str(path) != os.devnull:
        raise UserError(f"{path} is not a regular file; {CONFIG_VARIABLE} names a YAML file")
    if not read_text(path).strip():
        return {}
    return check_config(read_yaml(path, EXPECTED), str(path))


def read_text(path: Path) -> str:
    if str(path) == os.devnull:
        return ""
    return read_small_file(path).decode("utf-8", errors="replace")


def check_config(content: Mapping[Any, Any], place: str) -> dict[str, Any]:
    """Check keys and values; ``place`` begins the error."""
    own = {key: value for key, value in content.items() if key not in (ALIASES, "history")}
    checked = check_settings(own, place, (*setting_types(), "history", ALIASES))
    if "history" in content:
        if not isinstance(content["history"], bool):
            raise UserError(f"{place}: history is {content['history']!r}; choose true or false")
        checked["history"] = content["history"]
    aliases = content.get(ALIASES, {})
    if not isinstance(aliases, Mapping):
        raise UserError(f"{place}: aliases must map names to settings, as in ocr: {{model: 8b}}")
    if aliases:
        checked[ALIASES] = {
            check_alias_name(name, place): check_alias(alias, f"{place}: alias {name}")
            for name, alias in aliases.items()
        }
    return checked


def check_alias_name(name: object, place: str) -> str:
    from internvl3_mlx.config.published import find_size
    from internvl3_mlx.loading.resolve import DEMO

    if not isinstance(name, str) or not name or set(name) & set("/.:~") or name.isspace():
        raise UserError(f"{place}: {name!r} cannot be an alias; use letters, digits and hyphens")
    if name == DEMO or find_size(name):
        raise UserError(f"{place}: {name} is the name of a model; choose another alias")
    return name


def check_alias(alias: object, place: str) -> dict[str, Any]:
    if not isinstance(alias, Mapping) or "model" not in alias:
        raise UserError(f"{place} names no model; write it as {{model: 8b}}")
    return check_settings(alias, place, tuple(setting_types()))


def check_settings(
    content: Mapping[Any, Any], place: str, known: tuple[str, ...]
) -> dict[str, Any]:
    """Check that every key is known and every value is one that its flag takes."""
    from internvl3_mlx.cli.generation_fields import make_config

    types = setting_types()
    checked = dict[str, Any]()
    for given, value in content.items():
        key = given if given in types else canonical_key(given)
        if not isinstance(key, str) or key not in types:
            raise UserError(f"{place}: unknown setting {key!r}; {did_you_mean(str(key), known)}")
        if key in checked:
            raise UserError(f"{place}: {key} is set twice; remove one of them")
        checked[key] = check_type(key, value, types[key], place)
    try:
        make_config(
            {param(key): v for key, v in checked.items() if key not in ("model", "adapter")}
        )
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    return checked


def check_type(key: str, value: object, kind: type, place: str) -> object:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind is float and (whole or isinstance(value, float)):
        return value
    if kind is int and whole:
        return value
    if kind is str and isinstance(value, str):
        return value
    wanted = {float: "a number", int: "a whole number", str: "text; put it in quotes"}[kind]
    raise UserError(f"{place}: {key} is {value!r}; it must be {wanted}")


def param(key: str) -> str:
    """Return the parameter of a command that a key sets."""
    return key.replace("-", "_")


def param_key(field: str) -> str:
    """Return the key of a field: the reverse of ``param``."""
    return field.replace("_", "-")


def find_alias(name: str) -> dict[str, Any]:
    """Return the settings of a model's name: those of an alias, or the name alone."""
    found: dict[str, Any] = read_config().get(ALIASES, {}).get(name, {"model": name})
    return found


def alias_names() -> list[str]:
    """List the aliases, for completion: none where the file cannot be read."""
    try:
        return sorted(read_config().get(ALIASES, {}))
    except UserError:
        return []


def choose_model(ctx: click.Context, _param: click.Parameter, given: str | None) -> str | None:
    """Return the model of the flag, the environment or the file, and set the file's defaults.

    The callback of ``--model``, which is read before other flags: click takes what they lack from
    the context's map of defaults.
    """
    if ctx.resilient_parsing:
        return given
    config = read_config()
    aliases = config.pop(ALIASES, {})
    if given is not None and given != config.get("model"):
        config.pop("adapter", None)  # it was made for the file's own model
    name = given if given is not None else config.get("model")
    if name in aliases:
        config = {**config, **aliases[name]}
        if "adapter" not in aliases[name]:
            config.pop("adapter", None)
        name = config["model"]
    if ctx.command.name in WITH_SETTINGS:
        ctx.default_map = {param(key): value for key, value in config.items() if key != "model"}
    return name


def parse_value(key: str, text: str) -> object:
    """Parse the value of a setting as its flag does."""
    if key == "history":
        if text.lower() not in ("on", "off", "true", "false"):
            raise UserError(f"history is {text!r}; choose on or off")
        return text.lower() in ("on", "true")
    kind = setting_types().get(key, str)
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise UserError(f"{key} is {text!r}; it must be {wanted}") from None


def change_setting(name: str, text: str | None) -> None:
    """Set a setting, or with None remove it: a key, or aliases.NAME.KEY, or aliases.NAME to remove.

    Raises UserError for an unknown one, and for a file with comments, which would be lost.
    """
    config = read_config(may_be_missing=True)
    check_rewritable()
    *parents, key = name.split(".")
    key = str(canonical_key(key)) if len(parents) != 1 else key
    if parents and (parents[0] != ALIASES or len(parents) > 2 or (len(parents) == 1 and text)):
        raise UserError(f"unknown setting {name!r}; an alias is set with aliases.NAME.model 8b")
    place = config
    for parent in parents:
        place = place.setdefault(parent, {})
    if text is not None:
        place[key] = parse_value(key, text)
    elif place.pop(key, None) is None:
        raise UserError(f"{name} is not set; internvl3 config lists what is")
    write_config(check_config(config, str(config_path())))


def check_rewritable() -> None:
    path = config_path()
    if str(path) == os.devnull:
        raise UserError(f"{CONFIG_VARIABLE} turns the file off; unset it first")
    lines = read_text(path).splitlines() if path.exists() else []
    if any(line.lstrip().startswith("#") or " #" in line for line in lines):
        raise UserError(f"{path} has comments, which would be lost; edit the file yourself")


def write_config(config: Mapping[str, Any]) -> None:
    import yaml

    path = config_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {path.parent}: {error.strerror}; check the path") from error
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True) if config else ""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")
