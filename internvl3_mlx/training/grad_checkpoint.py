"""Run a piece of the model now and again in the backward pass, instead of keeping what it made.

``mx.checkpoint`` alone gives captured weights no gradient and draws other dropout masks the second
time. Here the weights that are trained go in as arguments, and both runs draw from one seed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from internvl3_mlx.models.layers import BlockRunner

SEEDS = 2**31 - 1  # as many as the generator's integers tell apart
STREAMS = 2**16  # seeds kept for the pieces of one forward pass
WORD = 32  # bits in each half of the generator's state


def checkpointed_runner() -> BlockRunner:
    """Make what calls blocks during one forward pass, and again during its backward pass."""
    first, count = draw_seed(), 0

    def run(block: nn.Module, x: mx.array, *rest: Any) -> mx.array:
        nonlocal count
        count += 1
        seed = first + count

        def piece(weights: dict[str, Any], x: mx.array) -> mx.array:
            with swapped_weights(block, weights), seeded(seed):
                out: mx.array = block(x, *rest)
                return out

        out: mx.array = mx.checkpoint(piece)(block.trainable_parameters(), x)
        return out

    return run


def draw_seed() -> int:
    """Draw where a forward pass's seeds begin. Waits for nothing but a number of its own."""
    drawn: Any = mx.random.randint(0, SEEDS).item()
    return STREAMS * int(drawn)


@contextmanager
def swapped_weights(module: nn.Module, weights: dict[str, Any]) -> Iterator[None]:
    """Lend a module other weights; its own come back afterwards."""
    own = module.trainable_parameters()
    module.update(weights)
    try:
        yield
    finally:
        module.update(own)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw random numbers from ``seed``; afterwards go on where the generator stood."""
    state: Any = mx.random.state
    high, low = state[0].tolist()
    mx.random.seed(seed)
    try:
        yield
    finally:
        mx.random.seed(high << WORD | low)


def is_trainable(part: nn.Module) -> bool:
    """Tell whether anything in a part of the model is trained."""
    return bool(tree_flatten(part.trainable_parameters()))
