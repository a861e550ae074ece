"""How towers and decoders call their blocks: plainly, unless training has other plans."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Run = Callable[..., mx.array]  # (block, x, *rest) -> what the block makes of x


def plainly(block: nn.Module, x: mx.array, *rest: Any) -> mx.array:
    """Call a block as it is."""
    out: mx.array = block(x, *rest)
    return out
