"""Where the arrays are computed."""

import mlx.core as mx


def on_gpu() -> bool:
    return mx.default_device() == mx.Device(mx.gpu)
