"""Activations as the checkpoints use them, and how blocks are called.

Activations compute in float32 inside, as PyTorch's kernels do.
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from internvl3_mlx.device import on_gpu

INVERSE_SQRT_2 = 1 / math.sqrt(2)

Result = TypeVar("Result")


def compile_on_gpu(function: Callable[..., Result]) -> Callable[..., Result]:
    """Compile an elementwise function into one GPU kernel; on a CPU call it unchanged.

    There MLX would call a C++ compiler at run time, which a user's machine may lack. The device is
    asked at every call, since it may be chosen after this module is imported.
    """
    compiled: Callable[..., Result] = mx.compile(function, shapeless=True)

    @wraps(function)
    def call(*arguments: mx.array) -> Result:
        return compiled(*arguments) if on_gpu() else function(*arguments)

    return call


@compile_on_gpu
def gelu(x: mx.array) -> mx.array:
    """Apply the exact GELU; the tanh approximation is off by 1e-3 after all layers of InternViT."""
    wide = x.astype(mx.float32)
    return (wide * 0.5 * (1 + mx.erf(wide * INVERSE_SQRT_2))).astype(x.dtype)


@compile_on_gpu
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Return silu(gate) * up."""
    wide = gate.astype(mx.float32)
    return (wide * mx.sigmoid(wide)).astype(gate.dtype) * up


def has_one_token(x: mx.array) -> bool:
    """Return whether states are of one token of each sequence: (B, 1, D), or (B, D).

    A compiled step passes them without the axis of tokens: MLX would drop it before each product
    of a linear layer, and put it back after.
    """
    return x.ndim == 2 or x.shape[1] == 1


BlockRunner = Callable[..., mx.array]  # (block, x, *arguments) -> the output of the block


def run_block(block: nn.Module, x: mx.array, *arguments: Any) -> mx.array:
    """Call a block: the default BlockRunner."""
    out: mx.array = block(x, *arguments)
    return out


def after(x: mx.array, dependencies: list[mx.array]) -> mx.array:
    """Return x, to be used only after ``dependencies`` have been computed."""
    out: mx.array = mx.depends(x, dependencies) if dependencies else x
    return out
