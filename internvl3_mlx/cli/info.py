"""``internvl3 info``: describes the installation, or a model from its files."""

from typing import Any

import click

from internvl3_mlx.cli import console, options
from internvl3_mlx.cli.flags import SectionedCommand
from internvl3_mlx.cli.system_info import (
    device_info,
    format_sizes,
    installed_version,
    library_versions,
)

EXTRAS = {"video": "av", "heic": "pillow-heif", "pdf": "pypdfium2", "structured": "llguidance"}
SHOWN_CONFIG_KEYS = ("template", "max_dynamic_patch", "use_thumbnail")


@click.command(
    cls=SectionedCommand,
    short_help="Describe the installation, a model, or an adapter.",
    examples=(
        ("internvl3 info", "versions, device, memory limits, cached models"),
        ("internvl3 info 2b", "layout, parameters and bits of a model"),
        ("internvl3 info my-model --json", "the same for a script"),
    ),
)
@click.argument("model", required=False, metavar="[PATH|REPO|SIZE]")
@options.JSON_FLAG
@options.debug_flag
def info_command(model: str | None, as_json: bool) -> None:
    """Describe the installation and the cached models, or one model or adapter.

    The weights of a model are not loaded. Of a repository that is not on this machine only the
    configs are downloaded, to tell what it is.
    """
    table = describe_model_files(model) if model else describe_installation()
    if as_json:
        console.print_json(table, indent=2)
    else:
        console.print_table(readable_info(table))


def describe_model_files(model: str) -> dict[str, Any]:
    """Read the facts of a model (layout, parts, bits, files, stop tokens) or of an adapter."""
    from internvl3_mlx.loading.inspect import inspect_model

    return inspect_model(model).to_dict()


def readable_info(table: dict[str, Any]) -> dict[str, Any]:
    """Choose and word what people read: sizes with units, few lines of the config."""
    config = table.get("config", {})
    chosen = {name: config[name] for name in SHOWN_CONFIG_KEYS if name in config}
    rest = {name: value for name, value in table.items() if name != "config"}
    return format_sizes({**rest, **chosen})


def describe_installation() -> dict[str, Any]:
    """Gather versions, the device with its memory limits, and the InternVL3 models in the cache."""
    return {
        "versions": library_versions(),
        "extras": {extra: installed_version(library) for extra, library in EXTRAS.items()},
        "device": device_info(),
        "cached_models": _cached_models() or "none",
    }


def _cached_models() -> list[dict[str, Any]]:
    """List the downloads of the family, then our quantized copies."""
    from internvl3_mlx.loading.model_store import list_models

    return [
        {
            "model": model.name if model.origin == "download" else str(model.folder),
            "nbytes": model.nbytes,
        }
        for model in list_models()
    ]
