"""``internvl3 info``: what is installed, what a model folder or repository holds."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from internvl3_mlx.cli import options, screen
from internvl3_mlx.cli.options import SectionedCommand

LIBRARIES = ("internvl3-mlx", "mlx", "mlx-lm", "numpy", "pillow", "huggingface-hub", "tokenizers")
EXTRAS = {"video": "av", "heic": "pillow-heif"}
FAMILY = "internvl3"  # what a cached repository's name holds
GB, MB = 1e9, 1e6
CONFIG_LINES = ("template", "max_dynamic_patch", "use_thumbnail")


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
    from internvl3_mlx.loading import inspect

    return inspect(model).to_dict()


def readable(table: dict[str, Any]) -> dict[str, Any]:
    """Choose and word what people read: sizes with units, few lines of the config."""
    config = table.get("config", {})
    chosen = {name: config[name] for name in CONFIG_LINES if name in config}
    rest = {name: value for name, value in table.items() if name != "config"}
    return _with_units({**rest, **chosen})


def _with_units(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            ("size" if name == "nbytes" else name): (
                _size(item) if name == "nbytes" else _with_units(item)
            )
            for name, item in value.items()
        }
    return [_with_units(item) for item in value] if isinstance(value, list) else value


def _size(nbytes: int) -> str:
    """Put a size in units of 1000, as disks and the hub count: 4.18 GB, 7.4 MB."""
    return f"{nbytes / GB:,.2f} GB" if nbytes >= GB else f"{nbytes / MB:,.1f} MB"


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
    """Describe what MLX computes on. Sizes in GB of 10**9 bytes."""
    import mlx.core as mx

    facts = mx.device_info()
    limits = {
        "memory_gb": facts.get("memory_size"),
        "usable_by_gpu_gb": facts.get("max_recommended_working_set_size"),
        "largest_buffer_gb": facts.get("max_buffer_length"),
    }
    return {
        "computes_on": str(facts.get("device_name", mx.default_device())),
        "metal": mx.metal.is_available(),
        **{name: round(float(size) / GB, 1) for name, size in limits.items() if size is not None},
    }


def _cached_models() -> list[dict[str, Any]]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    found = [repo for repo in repos if repo.repo_type == "model" and FAMILY in repo.repo_id.lower()]
    return [
        {"model": repo.repo_id, "gb": round(repo.size_on_disk / GB, 2)}
        for repo in sorted(found, key=lambda repo: repo.repo_id)
    ]
