"""The device that computes: GPU or CPU, and how much memory a model may take there."""

import os
import platform
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx

TF32_VARIABLE = "MLX_ENABLE_TF32"
RECOMMENDED_SIZE = "max_recommended_working_set_size"
MACOS_VERSION_FILE = Path("/System/Library/CoreServices/SystemVersion.plist")


def on_gpu() -> bool:
    """Return whether MLX computes on the GPU by default."""
    return mx.default_device() == mx.Device(mx.gpu)


def on_cpu() -> bool:
    """Return whether MLX computes on the CPU by default."""
    return mx.default_device() == mx.Device(mx.cpu)


def use_full_float32() -> None:
    """Keep MLX from multiplying float32 with 10 bits on the newest GPUs, unless the user chose to.

    Merged and quantized weights would keep the error. MLX reads the variable at its first product,
    so this comes before any.
    """
    os.environ.setdefault(TF32_VARIABLE, "0")


def gpu_info() -> dict[str, Any]:
    """Return what Metal says of the GPU, whatever the default device is; {} without Metal."""
    if not mx.metal.is_available():
        return {}
    return dict(mx.device_info(mx.Device(mx.gpu)))


def gpu_memory_limit() -> int:
    """Return the bytes a GPU may hold: Metal's recommendation, or all memory without one."""
    recommended = gpu_info().get(RECOMMENDED_SIZE)
    if recommended:
        return int(recommended)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@lru_cache(maxsize=1)
def macos_version() -> str:
    """Return the version and build of macOS, such as 15.3.1 (24D70); on Linux, the kernel's.

    The build changes with every update, those that keep the version included.
    """
    import plistlib  # not needed to start

    try:
        facts = plistlib.loads(MACOS_VERSION_FILE.read_bytes())
        return f"{facts['ProductVersion']} ({facts['ProductBuildVersion']})"
    except Exception:  # noqa: BLE001  no such file, or damaged in any way
        return platform.release()
