"""``internvl3 info``: what is installed, what a model folder or repository holds."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from internvl3_mlx.cli import options, screen
from internvl3_mlx.cli.options import SectionedCommand

LIBRARIES = ("internvl3-mlx", "mlx", "mlx-lm", "numpy", "pillow", "huggingface-hub", "tokenizers")
EXTRAS = {"video": "av", "heic": "pillow-heif", "pdf": "pypdfium2", "structured": "llguidance"}
FAMILY = "internvl3"  # what a cached repository's name holds
CONFIG_LINES = ("template", "max_dynamic_patch", "use_thumbnail")


# what info calls a limit -> what MLX calls it
LIMITS = {
    "memory_nbytes": "memory_size",
    "usable_by_gpu_nbytes": "max_recommended_working_set_size",
    "largest_buffer_nbytes": "max_buffer_length",
}


@click.command(
    cls=SectionedCommand, short_help="Show versions, device and cached models, or a model's facts."
)
@click.argument("model", required=False, metavar="[PATH|REPO|SIZE]")
@options.flag("Output", "--json", "as_json", is_flag=True, help="One JSON object.")
@options.debug
def info(model: str | None, as_json: bool) -> None:
    """Show versions, device and cached models, or what a model's files say.

    The weights of a model are not loaded, and nothing is downloaded but a repository's small files.
    """
    table = about_model(model) if model else about_machine()
    if as_json:
        screen.as_json(table, indent=2)
    else:
        screen.facts(readable(table))


def about_model(model: str) -> dict[str, Any]:
    """Read a model's facts: layout, parts with parameters and bits, files, stop tokens."""
    from internvl3_mlx.loading.facts import inspect

    return inspect(model).to_dict()


def readable(table: dict[str, Any]) -> dict[str, Any]:
    """Choose and word what people read: sizes with units, few lines of the config."""
    config = table.get("config", {})
    chosen = {name: config[name] for name in CONFIG_LINES if name in config}
    rest = {name: value for name, value in table.items() if name != "config"}
    return _with_units({**rest, **chosen})


def _with_units(value: Any) -> Any:
    """Give what is counted in bytes a unit: ``nbytes`` becomes size, ``x_nbytes`` becomes x."""
    if isinstance(value, list):
        return [_with_units(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        name.removesuffix("_nbytes").replace("nbytes", "size"): (
            screen.size(item) if name.endswith("nbytes") else _with_units(item)
        )
        for name, item in value.items()
    }


def about_machine() -> dict[str, Any]:
    """Gather versions, the device with its memory limits, and the InternVL3 models in the cache."""
    return {
        "versions": {
            "python": platform.python_version(),
            "system": _system(),
            **{name: _installed(name) for name in LIBRARIES},
        },
        "extras": {extra: _installed(library) for extra, library in EXTRAS.items()},
        "device": _device(),
        "cached_models": _cached_models() or "none",
    }


def _system() -> str:
    release = platform.mac_ver()[0]
    return f"{f'macOS {release}' if release else platform.platform()} {platform.machine()}"


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _device() -> dict[str, Any]:
    """Describe what MLX computes on and how much memory that may take."""
    import mlx.core as mx

    facts = mx.device_info()
    limits = {name: facts[key] for name, key in LIMITS.items() if key in facts}
    return {
        "computes_on": str(facts.get("device_name", mx.default_device())),
        "metal": mx.metal.is_available(),
        **limits,
    }


def _cached_models() -> list[dict[str, Any]]:
    """List the family's repositories in the hub's cache, then our packed copies of them."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    from internvl3_mlx.loading.names import model_cache

    try:
        repos = {repo.repo_id: repo for repo in scan_cache_dir().repos if repo.repo_type == "model"}
    except CacheNotFound:
        repos = {}
    hub = {name: repo.size_on_disk for name, repo in repos.items() if FAMILY in name.lower()}
    packed = {
        str(config.parent): sum(file.stat().st_size for file in config.parent.iterdir())
        for config in model_cache().glob("*/config.json")
    }
    return [
        {"model": name, "nbytes": nbytes}
        for found in (hub, packed)
        for name, nbytes in sorted(found.items())
    ]
