"""What this machine can give a model."""

import os

import mlx.core as mx


def gpu_bytes() -> int:
    """Return the bytes the GPU may hold: Metal's recommendation, or all memory without Metal."""
    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
