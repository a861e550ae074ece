"""``internvl3 train``: fine-tune. The flags are the fields of ``TrainRecipe``."""

from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import click

from internvl3_mlx.cli import options
from internvl3_mlx.cli.options import Decorator, Function, SectionedCommand, flag
from internvl3_mlx.errors import UserError
from internvl3_mlx.option_fields import field_info, field_type
from internvl3_mlx.training.config import PRESETS, TrainConfig
from internvl3_mlx.training.config_file import CONFIG_FILE, build_config

TYPES = {int: click.INT, float: click.FLOAT, str: click.STRING, tuple: click.STRING}
METAVARS = {int: "N", float: "X", str: "TEXT", tuple: "NAMES"}


def config_flags(command: Function) -> Function:
    """Give ``command`` a flag for each field of the recipe."""
    for entry in reversed(fields(TrainConfig)):
        command = field_flag(entry)(command)
    return command


def field_flag(entry: "Field[Any]") -> Decorator:
    """Make a flag of one field. Not given it has no value: YAML and presets show through."""
    if entry.name == "model":
        return options.LOAD_FLAGS["model"]
    known, (kind, _) = field_info(entry), field_type(TrainConfig, entry.name)
    name = "--" + entry.name.replace("_", "-")
    extra: dict[str, Any] = {"help": known.help, "default": None}
    if kind is bool:
        name = f"{name}/--no-{name[2:]}"
    elif known.choices:
        extra["type"] = click.Choice(known.choices)
    else:
        extra |= {"type": TYPES[kind], "metavar": known.metavar or METAVARS[kind]}
    return flag(known.section, name, entry.name, show_default=format_default(entry), **extra)


def format_default(entry: "Field[Any]") -> str | bool:
    """Put a default in words, with what the methods make of it."""
    own = (
        field_info(entry).default_text
        if entry.default is None
        else format_field_value(entry.default)
    )
    others = [
        f"{method} {format_field_value(preset[entry.name])}"
        for method, preset in PRESETS.items()
        if entry.name in preset
    ]
    return "; ".join(filter(None, [own, *others])) or False


def format_field_value(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


@click.command(cls=SectionedCommand, short_help="Fine-tune a model on your own rows.")
@flag("Run", "-c", "--config", "config", metavar="FILE", help="A YAML recipe; flags go over it.")
@flag("Run", "--check", "check", is_flag=True, help="Check the data, show one sample, and leave.")
@flag("Run", "--dry-run", "dry_run", is_flag=True, help="Say what would be done; train nothing.")
@flag("Run", "--resume", "resume", is_flag=True, help="Go on where the run in FOLDER stopped.")
@flag(
    "Run", "--accept-changes", "accept_changes", is_flag=True,
    help="Go on even with other settings or data.",
)  # fmt: skip
@flag("Run", "--overwrite", "overwrite", is_flag=True, help="Replace an earlier run in FOLDER.")
@config_flags
@flag("Output", "--json", "as_json", is_flag=True, help="JSON lines.")
@flag("Output", "--quiet", "quiet", is_flag=True, help="No notes, no progress.")
@options.debug_flag
def train_command(config: str | None, **flags: Any) -> None:
    """Fine-tune a model on rows of your own, with adapters or in whole parts.

    --data is checked whole before the model loads. FOLDER of --adapter-path receives the adapter in
    PEFT's form, checkpoints, the recipe, metrics.csv and loss.svg; Ctrl-C saves, and --resume goes
    on to the bit.

    --method sft learns the answers of conversations, mpo to prefer one answer to another, pretrain
    trains all weights on packed text and pictures. The defaults are the published settings, but for
    small batches and, with sft and mpo, steps that suit adapters.

    Several Macs: mlx.launch --hostfile hosts.json -- internvl3 train -c recipe.yaml
    """
    from internvl3_mlx.cli.train_run import TrainRequest, run_train

    names = [entry.name for entry in fields(TrainConfig)]
    given = {name: value for name in names if (value := flags.pop(name)) is not None}
    recipe = build_config(given, choose_config_file(config, given, resumes=flags["resume"]))
    if recipe.data is None:
        if flags["resume"] and config is None:
            raise UserError(f"no run in {recipe.adapter_path}; name its folder: --adapter-path")
        raise UserError("no data to learn from: pass --data with a folder or a JSONL file")
    raise SystemExit(run_train(TrainRequest(recipe, **flags)))


def choose_config_file(config: str | None, given: dict[str, Any], *, resumes: bool) -> Path | None:
    """Choose the YAML below the flags: the one that is named, or that of the run to go on with."""
    if config is not None:
        return Path(config).expanduser()
    folder = given.get("adapter_path", field_default("adapter_path"))
    kept = Path(folder).expanduser() / CONFIG_FILE
    return kept if resumes and kept.is_file() else None


def field_default(name: str) -> Any:
    return next(entry.default for entry in fields(TrainConfig) if entry.name == name)
