"""The flags that several commands share.

They describe parameters of ``load`` and fields of ``GenerationConfig`` (in
``cli.generation_fields``); their defaults and bounds are written there, not here.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from internvl3_mlx.cli.flags import Decorator, Function, apply_flags, flag, make_flag
from internvl3_mlx.cli.generation_fields import (
    GENERATION_DEFAULTS,
    GENERATION_FIELDS,
    PARSERS,
)
from internvl3_mlx.cli.user_config import alias_names, choose_model
from internvl3_mlx.option_fields import FieldInfo

if TYPE_CHECKING:
    pass

DEBUG_KEY = "internvl3_mlx.debug"  # where --debug is stored while a command runs
STDIN = "-"  # as an image or as the question: read standard input


@dataclass(frozen=True)
class OutputOptions:
    """How the answer is printed."""

    as_json: bool
    as_jsonl: bool
    each: bool
    quiet: bool
    stats: bool


def list_model_completions(
    _ctx: click.Context | None, _param: click.Parameter | None, typed: str
) -> list[CompletionItem]:
    """Complete ``--model``: sizes, the demo, aliases, cached repositories, folders."""
    from internvl3_mlx.config.published import PUBLISHED_SIZES
    from internvl3_mlx.loading.model_store import download_names
    from internvl3_mlx.loading.resolve import DEMO

    names = [*PUBLISHED_SIZES, DEMO, *alias_names(), *download_names()]
    return [CompletionItem(name) for name in [*names, *folders(typed)] if name.startswith(typed)]


def folders(typed: str) -> list[str]:
    """List the folders whose path begins with ``typed``, as names: bash drops every name where an
    item asks for its own completion of folders.
    """
    parent, name = os.path.split(typed)
    try:
        found = [
            entry.name
            for entry in os.scandir(os.path.expanduser(parent) or ".")
            if entry.name.startswith(name) and (name or entry.name[0] != ".") and entry.is_dir()
        ]
    except OSError:
        return []
    return sorted(os.path.join(parent, entry) for entry in found)


def model_flag(name: str, info: FieldInfo, **extra: Any) -> Decorator:
    """Make a flag that takes a model and completes its name."""
    return make_flag(name, info, str, None, shell_complete=list_model_completions, **extra)


LOAD_FLAGS: Mapping[str, Decorator] = {
    "model": model_flag(
        "model",
        FieldInfo(
            "Model", "Folder, hub repository, size such as 2b, or demo.", metavar="PATH|REPO|SIZE"
        ),
        envvar="INTERNVL3_MODEL",
        show_envvar=True,
        callback=choose_model,
        is_eager=True,  # an alias sets the defaults of other flags
    ),
    "revision": make_flag(
        "revision",
        FieldInfo("Model", "Branch, tag or commit on the hub.", metavar="NAME"),
        str,
        None,
    ),
    "quantize": make_flag(
        "quantize",
        FieldInfo(
            "Model", "Bits of the language model; by default 4 for sizes, else as stored.",
            choices=("4", "8", "16"), flags=("--q-bits",),
        ),
        int,
        None,
        callback=lambda _ctx, _param, bits: bits and int(bits),
    ),
    "dtype": make_flag(
        "dtype",
        FieldInfo(
            "Model", "Data type to compute in; by default the model's own, float32 on a CPU.",
            choices=("float32", "bfloat16", "float16"),
        ),
        str,
        None,
    ),
    "adapter": make_flag(
        "adapter",
        FieldInfo(
            "Model", "Folder or repository of a LoRA or DoRA adapter, as train and PEFT write it.",
            metavar="PATH|REPO", flags=("--adapter-path",),
        ),
        str,
        None,
    ),
}  # fmt: skip


def generation_flag(name: str, default_text: str = "") -> Decorator:
    """Make the flag of a field of ``GenerationConfig``; default_text: shown instead of its own."""
    kind, info = GENERATION_FIELDS[name]
    extra: dict[str, Any] = {}
    if name == "stop":
        extra["multiple"] = True
    if name == "draft_model":
        extra["shell_complete"] = list_model_completions
    if parse := PARSERS.get(name):
        extra["callback"] = lambda _ctx, _param, text: text and parse(text)
    return make_flag(name, info, kind, GENERATION_DEFAULTS.get(name), default_text, **extra)


GENERATION_FLAGS: Mapping[str, Decorator] = {
    name: generation_flag(name) for name in GENERATION_FIELDS
}
JSON_FLAG = flag("Output", "--json", "as_json", is_flag=True, help="Print one JSON object.")
QUIET_FLAG = flag("Output", "--quiet", "quiet", is_flag=True, help="No notes and no progress.")
OUTPUT_FLAGS: Mapping[str, Decorator] = {
    "as_json": JSON_FLAG,
    "as_jsonl": flag(
        "Output", "--jsonl", "as_jsonl", is_flag=True, help="Print one line of JSON per answer."
    ),
    "each": flag(
        "Output",
        "--each",
        "each",
        is_flag=True,
        help="Ask about each image or document separately.",
    ),
    "quiet": QUIET_FLAG,
    "stats": flag("Output", "--stats", "stats", is_flag=True, help="Show speed and memory."),
}


def _remember_debug(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    ctx.meta[DEBUG_KEY] = value


# Eager, so that a mistake in any other flag is shown with its traceback, too.
debug_flag = flag(
    "Output", "--debug", is_flag=True, expose_value=False, is_eager=True, callback=_remember_debug,
    help="Show the full traceback of an error.",
)  # fmt: skip


def load_flags(command: Function) -> Function:
    """Give ``command`` the flags of ``load``, collected in the dictionary ``load_options``."""
    return gather(command, LOAD_FLAGS, "load_options", only_given)


def generation_flags(command: Function) -> Function:
    """Give ``command`` the flags of ``GenerationConfig``, collected in ``generation_options``."""
    return gather(command, GENERATION_FLAGS, "generation_options", only_given)


def output_flags(command: Function) -> Function:
    """Give ``command`` the output flags as one ``OutputOptions``."""
    return gather(command, OUTPUT_FLAGS, "output", lambda values: OutputOptions(**values))


def gather(
    command: Function,
    table: Mapping[str, Decorator],
    name: str,
    join: Callable[[dict[str, Any]], object],
) -> Function:
    """Give ``command`` the flags of a table, joined in one argument ``name``."""

    @wraps(command)
    def gathered(**values: Any) -> object:
        taken = {field: values.pop(field) for field in table}
        return command(**values, **{name: join(taken)})

    return apply_flags(table.values(), gathered)


def only_given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None and value != ()}
