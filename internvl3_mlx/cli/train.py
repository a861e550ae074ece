"""``internvl3 train``: fine-tunes a model. Its flags are the fields of ``TrainConfig``."""

from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import click

from internvl3_mlx.cli import options
from internvl3_mlx.cli.flags import (
    Function,
    SectionedCommand,
    apply_flags,
    flag,
    flag_from_field,
    format_default,
)
from internvl3_mlx.errors import UserError
from internvl3_mlx.option_fields import field_info
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.config_file import CONFIG_FILE, build_config
from internvl3_mlx.training.presets import PRESETS
from internvl3_mlx.user_paths import expand_user


def config_flags(command: Function) -> Function:
    """Give ``command`` a flag for each field of ``TrainConfig``."""
    flags = [
        options.LOAD_FLAGS["model"]
        if entry.name == "model"
        else flag_from_field(TrainConfig, entry, describe_defaults(entry))
        for entry in fields(TrainConfig)
    ]
    return apply_flags(flags, command)


def describe_defaults(entry: "Field[Any]") -> str:
    """Return the default of a field, and what the presets of other methods make of it."""
    own = field_info(entry).default_text if entry.default is None else format_default(entry.default)
    others = [
        f"{method} {format_default(preset[entry.name])}"
        for method, preset in PRESETS.items()
        if entry.name in preset
    ]
    return "; ".join(filter(None, [own, *others]))


@click.command(
    cls=SectionedCommand,
    short_help="Fine-tune a model on your own data.",
    examples=(
        ("internvl3 train --model 2b --data receipts --check", "validate the data"),
        ("internvl3 train --model 2b --data receipts --epochs 3", "LoRA; Ctrl-C saves"),
        ("internvl3 train --resume --adapter-path adapters", "continue a stopped run"),
    ),
    suggestions={
        "-q": "--quiet",
        "--quantize": "--q-bits",
        "--recipe": "--config",
        "--lr": "--learning-rate",
        "--save-steps": "--save-every",
        "--resume-from-checkpoint": "--resume",
    },
)
@flag("Run", "-c", "--config", "config", metavar="FILE", help="YAML settings; flags override them.")
@flag("Run", "--check", "check", is_flag=True, help="Validate the data, show one sample, and stop.")
@flag("Run", "--dry-run", "dry_run", is_flag=True, help="Show the plan without training.")
@flag("Run", "--resume", "resume", is_flag=True, help="Continue the run in --adapter-path.")
@flag(
    "Run",
    "--from",
    "resume_from",
    metavar="STEP",
    type=int,
    help="With --resume: continue from the checkpoint of this update.",
)
@flag(
    "Run", "--accept-changes", "accept_changes", is_flag=True,
    help="Resume although settings or data have changed.",
)  # fmt: skip
@flag(
    "Run", "--overwrite", "overwrite", is_flag=True,
    help="Replace an earlier run in --adapter-path.",
)  # fmt: skip
@config_flags
@flag(
    "Upload",
    "--upload-repo",
    "upload_repo",
    metavar="OWNER/NAME",
    help="Upload the result, the best one if there is validation, to this repository.",
)
@flag("Upload", "--private", "private", is_flag=True, help="Make a new repository private.")
@flag(
    "Upload",
    "-y",
    "--yes",
    "yes",
    is_flag=True,
    help="Do not ask before replacing a repository.",
)
@flag("Output", "--json", "as_json", is_flag=True, help="Print JSON lines.")
@options.QUIET_FLAG
@options.debug_flag
def train_command(config: str | None, **flags: Any) -> None:
    """Fine-tune a model on your own data, with adapters or in full.

    All data is validated before the model loads. The folder of --adapter-path receives the adapter
    in PEFT's format, checkpoints, the settings, metrics.csv and loss.svg. Ctrl-C saves, and
    --resume continues with bit-identical results.

    --method sft trains on the answers of conversations, mpo, dpo, orpo and simpo on preference
    pairs, kto on answers labeled good or bad, grpo on answers of its own and their --reward, prm a
    critic on the scored steps of solutions, pretrain all weights on packed text and images. The
    defaults are the published settings, except for smaller batches and, with sft and preferences,
    learning rates that suit adapters.

    Several Macs: mlx.launch --hostfile hosts.json -- internvl3 train -c train.yaml
    """
    from internvl3_mlx.cli.train_display import TrainRequest
    from internvl3_mlx.cli.train_run import run_train

    names = [entry.name for entry in fields(TrainConfig)]
    given = {name: value for name in names if (value := flags.pop(name)) is not None}
    train_config = build_config(given, choose_config_file(config, given, resumes=flags["resume"]))
    if train_config.data is None:
        if flags["resume"] and config is None:
            folder = train_config.adapter_path
            raise UserError(f"no run in {folder}; name its folder with --adapter-path")
        raise UserError("no training data; pass --data with a folder or a JSONL file")
    check_own_reward(train_config, given)
    if flags["upload_repo"] is not None:
        from internvl3_mlx.loading.hub import check_repo_name

        check_repo_name(flags["upload_repo"])
    raise SystemExit(run_train(TrainRequest(train_config, **flags)))


def check_own_reward(config: TrainConfig, given: dict[str, Any]) -> None:
    """Raise ``UserError`` for a reward function that only a file names; say which one will run."""
    if config.reward is None:
        return
    from internvl3_mlx.cli import console
    from internvl3_mlx.training.rewards import names_function

    if not names_function(config.reward):
        return
    if "reward" not in given:
        raise UserError(
            f"the settings name {config.reward}, which is a program; to run it, name it on the "
            f"command line: --reward {config.reward}"
        )
    console.note(f"rewards are computed by your own function {config.reward}")


def choose_config_file(config: str | None, given: dict[str, Any], *, resumes: bool) -> Path | None:
    """Return the YAML file that flags override: the given one, or that of the run to resume."""
    if config is not None:
        return expand_user(config)
    default = next(entry.default for entry in fields(TrainConfig) if entry.name == "adapter_path")
    saved = expand_user(given.get("adapter_path", default)) / CONFIG_FILE
    return saved if resumes and saved.is_file() else None
