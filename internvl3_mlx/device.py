"""The device that computes: GPU or CPU, and how much memory a model may take there."""

import os
from typing import Any

import mlx.core as mx

RECOMMENDED_SIZE = "max_recommended_working_set_size"


def on_gpu() -> bool:
    """Return whether MLX computes on the GPU by default."""
    return mx.default_device() == mx.Device(mx.gpu)


def on_cpu() -> bool:
    """Return whether MLX computes on the CPU by default."""
    return mx.default_device() == mx.Device(mx.cpu)


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
