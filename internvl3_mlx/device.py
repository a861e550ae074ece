"""The device that computes: GPU or CPU, and how much memory a model may take there."""

import os

import mlx.core as mx


def on_gpu() -> bool:
    """Return whether MLX computes on the GPU by default."""
    return mx.default_device() == mx.Device(mx.gpu)


def on_cpu() -> bool:
    """Return whether MLX computes on the CPU by default."""
    return mx.default_device() == mx.Device(mx.cpu)


def gpu_memory_limit() -> int:
    """Return the bytes a GPU may hold: Metal's recommendation, or all memory without Metal."""
    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
