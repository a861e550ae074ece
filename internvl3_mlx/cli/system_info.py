"""Versions, the system, the device and its limits."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from internvl3_mlx.cli import console

LIBRARIES = ("internvl3-mlx", "mlx", "mlx-lm", "numpy", "pillow", "huggingface-hub", "tokenizers")
# our name of a limit -> MLX's name
LIMITS = {
    "memory_nbytes": "memory_size",
    "usable_by_gpu_nbytes": "max_recommended_working_set_size",
    "largest_buffer_nbytes": "max_buffer_length",
}


def library_versions() -> dict[str, str]:
    """Return the versions of Python, the system and every library that affects an answer."""
    return {
        "python": platform.python_version(),
        "system": system_name(),
        **{name: installed_version(name) for name in LIBRARIES},
    }


def system_name() -> str:
    release = platform.mac_ver()[0]
    return f"{f'macOS {release}' if release else platform.platform()} {platform.machine()}"


def installed_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def device_info() -> dict[str, Any]:
    """Return the device that MLX computes on, and its memory limits."""
    import mlx.core as mx

    from internvl3_mlx.device import gpu_info

    facts = gpu_info() or mx.device_info()
    limits = {name: facts[key] for name, key in LIMITS.items() if key in facts}
    return {
        "device_name": str(facts.get("device_name", mx.default_device())),
        "metal": mx.metal.is_available(),
        **limits,
    }


def format_sizes(value: Any) -> Any:
    """Format values in bytes: ``nbytes`` becomes ``size``, ``x_nbytes`` becomes ``x``."""
    if isinstance(value, list):
        return [format_sizes(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        name.removesuffix("_nbytes").replace("nbytes", "size"): (
            console.format_size(item) if name.endswith("nbytes") else format_sizes(item)
        )
        for name, item in value.items()
    }


def report_kernel_fallbacks(*, quiet: bool) -> None:
    """Show a note when a kernel falls back to MLX's operations.

    Raises UserError for an invalid INTERNVL3_KERNELS, before any work is done.
    """
    from internvl3_mlx.metal_kernels import dispatch

    dispatch.kernel_mode()
    dispatch.set_fallback_handler((lambda _: None) if quiet else console.note)
