"""``internvl3 config``: shows and changes the user's defaults and aliases."""

from collections.abc import Mapping
from typing import Any

import click

from internvl3_mlx.cli import console, options
from internvl3_mlx.cli.actions import ActionType
from internvl3_mlx.cli.flags import SectionedCommand
from internvl3_mlx.cli.user_config import (
    canonical_key,
    change_setting,
    config_path,
    read_config,
)
from internvl3_mlx.errors import UserError

# action -> how many words it takes
ACTIONS = {"show": 0, "get": 1, "set": 2, "unset": 1, "path": 0}
OTHER_WORDS = {"list": "show", "ls": "show", "rm": "unset", "remove": "unset", "edit": "path"}


@click.command(
    cls=SectionedCommand,
    short_help="Show and change your defaults and aliases.",
    examples=(
        ("internvl3 config set model 8b", "the model where --model is not given"),
        ("internvl3 config set aliases.ocr.model 8b", "a name of your own: --model ocr"),
        ("internvl3 config unset model", "back to the default"),
    ),
)
@click.argument("action", type=ActionType([*ACTIONS], OTHER_WORDS), default="show")
@click.argument("words", nargs=-1, metavar="[NAME] [VALUE]")
@options.JSON_FLAG
@options.debug_flag
def config_command(action: str, words: tuple[str, ...], as_json: bool) -> None:
    """Show and change your defaults and aliases.

    show lists the settings, get prints one. NAME is model, adapter, history or a flag of generate
    such as max-tiles; aliases.NAME.max-tiles is that of an alias. Flags win over the environment,
    the environment over the file. path prints where the file is; INTERNVL3_CONFIG names another
    file.
    """
    if len(words) != ACTIONS[action]:
        wants = {0: "no more words", 1: "a NAME", 2: "a NAME and a VALUE"}[ACTIONS[action]]
        raise UserError(f"internvl3 config {action} takes {wants}; see internvl3 config --help")
    if action == "path":
        console.write_line(str(config_path()))
    elif action == "show":
        show_config(as_json=as_json)
    elif action == "get":
        show_setting(words[0], as_json=as_json)
    else:
        change_setting(words[0], words[1] if action == "set" else None)


def show_config(*, as_json: bool) -> None:
    """Print the file's settings, one a line, as set takes them."""
    config = read_config(may_be_missing=True)
    if as_json:
        console.print_json(config, indent=2)
        return
    if not config:
        console.hint(f"no settings in {config_path()}; see internvl3 config --help")
    for key, value in config.items():
        if key != "aliases":
            console.write_line(f"{key}: {format_value(value)}")
    for name, alias in config.get("aliases", {}).items():
        for key, value in alias.items():
            console.write_line(f"aliases.{name}.{key}: {format_value(value)}")


def show_setting(name: str, *, as_json: bool) -> None:
    """Print the value of one setting alone. Raises UserError where it is not set."""
    value: Any = read_config(may_be_missing=True)
    *parents, key = name.split(".")
    for part in (*parents, str(canonical_key(key))):
        if not isinstance(value, Mapping) or part not in value:
            raise UserError(f"{name} is not set; internvl3 config lists what is")
        value = value[part]
    if as_json or isinstance(value, Mapping):
        console.print_json(value, indent=2)
    else:
        console.write_line(format_value(value))


def format_value(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)
