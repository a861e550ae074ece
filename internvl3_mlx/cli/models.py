"""``internvl3 models``: lists, fetches and removes the models on this machine."""

import sys
from typing import TYPE_CHECKING, Any

import click

from internvl3_mlx.cli import console, options
from internvl3_mlx.cli.actions import ActionType
from internvl3_mlx.cli.flags import SectionedCommand, flag
from internvl3_mlx.errors import UserError

if TYPE_CHECKING:
    from internvl3_mlx.loading.model_store import StoredModel

ACTIONS = ("list", "pull", "rm", "prune")
NAMED_ACTIONS = ("pull", "rm")
OTHER_WORDS = {  # of ollama, pip, hf and others
    "ls": "list", "show": "list", "download": "pull", "get": "pull", "fetch": "pull", "add": "pull",
    "install": "pull", "remove": "rm", "delete": "rm", "uninstall": "rm", "clean": "prune",
}  # fmt: skip


@click.command(
    cls=SectionedCommand,
    short_help="List, fetch and remove models.",
    examples=(
        ("internvl3 models", "what is stored, how large, and where"),
        ("internvl3 models pull 2b", "download a size and make its 4-bit copy"),
        ("internvl3 models prune", "remove downloads that a 4-bit copy was made from"),
    ),
)
@click.argument("action", type=ActionType(ACTIONS, OTHER_WORDS), default="list")
@click.argument("model", required=False)
@options.LOAD_FLAGS["quantize"]
@options.LOAD_FLAGS["revision"]
@flag("Output", "-y", "--yes", "yes", is_flag=True, help="Remove without asking.")
@options.JSON_FLAG
@options.QUIET_FLAG
@options.debug_flag
def models_command(action: str, model: str | None, **flags: Any) -> None:
    """List, fetch and remove the models on this machine.

    The first use of a size keeps two things: the 16-bit download in the hub's cache, and a 4-bit
    copy in ours, which is what is loaded. prune removes such downloads and keeps the copies; rm
    removes a model, or a size with its download and its copies.
    """
    if (model is None) == (action in NAMED_ACTIONS):
        wants = "needs a model" if model is None else "takes no model"
        raise UserError(f"internvl3 models {action} {wants}; see internvl3 models --help")
    if action == "list":
        show_models(as_json=flags["as_json"])
    elif action == "pull":
        pull_model(str(model), flags)
    else:
        remove(action, model, yes=flags["yes"])


def show_models(*, as_json: bool) -> None:
    """List the stored models with their sizes, and what each cache takes."""
    from internvl3_mlx.files import cache_folder
    from internvl3_mlx.loading.hub import hub_cache
    from internvl3_mlx.loading.model_store import find_unneeded, list_models

    models = list_models()
    if as_json:
        console.print_json(
            [describe(model) | {"nbytes": model.nbytes} for model in models], indent=2
        )
        return
    if not models:
        console.write_line("no models yet; internvl3 models pull 2b fetches one")
        return
    rows = [{**describe(model), "size": console.format_size(model.nbytes)} for model in models]
    console.print_table({"models": rows})
    for origin, folder in (("download", hub_cache()), ("quantized copy", cache_folder())):
        total = sum(model.nbytes for model in models if model.origin == origin)
        console.hint(f"{console.format_size(total)} of {origin} files in {folder}")
    if unneeded := find_unneeded():
        freed = console.format_size(sum(model.nbytes for model in unneeded))
        console.hint(f"internvl3 models prune frees {freed}: downloads that were quantized")


def describe(model: "StoredModel") -> dict[str, Any]:
    return {
        "name": model.name,
        "origin": model.origin,
        "age_days": model.age_days,
        "folder": str(model.folder),
    }


def pull_model(model: str, flags: dict[str, Any]) -> None:
    """Download a model, and quantize a published size once."""
    from internvl3_mlx.loading.fetch_model import fetch_model

    load = {key: flags[key] for key in ("revision",) if flags.get(key)}
    with console.spinner(f"fetching {model}", quiet=flags["quiet"]) as notify:
        local = fetch_model(model, flags.get("quantize"), notify=notify, **load)
    console.write_line(str(local.folder))


def remove(action: str, name: str | None, *, yes: bool) -> None:
    """Remove the named model, or what is no longer needed, after a confirmation."""
    from internvl3_mlx.loading.model_store import (
        find_stored,
        find_unneeded,
        remove_leftovers,
        remove_models,
    )

    if action == "prune":
        remove_leftovers()
    models = find_stored(name) if name is not None else find_unneeded()
    if not models:
        console.write_line("nothing to remove")
        return
    for model in models:
        size = console.format_size(model.nbytes)
        console.write_line(f"{model.name} ({model.origin}, {size}) in {model.folder}")
    if not yes and not sys.stdin.isatty():
        raise UserError("nothing was removed; pass --yes to remove without being asked")
    if yes or click.confirm("remove?", err=True):
        remove_models(models)
        freed = sum(model.nbytes for model in models)
        console.write_line(f"removed {console.format_size(freed)}")
