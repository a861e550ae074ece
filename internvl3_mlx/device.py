"""Where the arrays are computed."""

import os

import mlx.core as mx


def on_gpu() -> bool:
    return mx.default_device() == mx.Device(mx.gpu)


def gpu_memory_limit() -> int:
    """Return the bytes the GPU may hold: Metal's recommendation, or all memory without Metal."""
    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
