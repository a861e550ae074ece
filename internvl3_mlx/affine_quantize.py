"""Affine quantization with the same numbers on every device.

MLX's Metal kernel begins a group's maximum at 0, so a group of negative numbers alone gets a range
up to 0: almost twice the error for keys around -6, and other bytes than on a CPU.
"""

import mlx.core as mx

from internvl3_mlx.device import on_gpu


def quantize_exactly(
    x: mx.array, *, group_size: int, bits: int
) -> tuple[mx.array, mx.array, mx.array]:
    """Quantize in affine mode as MLX does on a CPU: (..., D) -> words, scales and biases.

    On a GPU, groups of negative numbers are quantized with the opposite sign, and their scales and
    biases negated: the levels are the same, and a maximum of at least 0 is what the kernel expects.
    """
    if not on_gpu():
        words, scales, biases = mx.quantize(x, group_size=group_size, bits=bits)
        return words, scales, biases
    groups = mx.unflatten(x, -1, (-1, group_size))
    sign = mx.where(groups.max(axis=-1) < 0, -1, 1).astype(x.dtype)
    flipped = (groups * sign[..., None]).reshape(x.shape)
    words, scales, biases = mx.quantize(flipped, group_size=group_size, bits=bits)
    return words, scales * sign, biases * sign
