"""Gradient checkpointing: recompute a block in the backward pass instead of storing activations.

``mx.checkpoint`` alone gives captured weights no gradient and draws new dropout masks in the
recomputation. Here the trainable weights are arguments, and both passes draw from the same seed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from internvl3_mlx.models.layers import BlockRunner

MAX_SEED = 2**31 - 1  # exclusive upper bound of a 32-bit integer draw
SEEDS_PER_PASS = 2**16  # seeds reserved for the blocks of one forward pass
WORD_BITS = 32  # bits in each half of the generator state


def checkpointed_runner() -> BlockRunner:
    """Return a function that runs blocks with gradient checkpointing during one forward pass."""
    first, count = draw_seed(), 0

    def run(block: nn.Module, x: mx.array, *rest: Any) -> mx.array:
        nonlocal count
        count += 1
        seed = first + count

        def forward(weights: dict[str, Any], x: mx.array) -> mx.array:
            with swapped_weights(block, weights), seeded(seed):
                out: mx.array = block(x, *rest)
                return out

        out: mx.array = mx.checkpoint(forward)(block.trainable_parameters(), x)
        return out

    return run


def draw_seed() -> int:
    """Draw the first seed of a forward pass; waits for this one number only."""
    drawn: Any = mx.random.randint(0, MAX_SEED).item()
    return SEEDS_PER_PASS * int(drawn)


@contextmanager
def swapped_weights(module: nn.Module, weights: dict[str, Any]) -> Iterator[None]:
    """Use other trainable weights inside the context; the module's own are restored afterwards."""
    original = module.trainable_parameters()
    module.update(weights)
    try:
        yield
    finally:
        module.update(original)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw random numbers from ``seed`` inside the context; the state is restored afterwards."""
    state: Any = mx.random.state
    high, low = state[0].tolist()
    mx.random.seed(seed)
    try:
        yield
    finally:
        mx.random.seed(high << WORD_BITS | low)


def is_trainable(module: nn.Module) -> bool:
    """Tell whether a module has any trainable parameters."""
    return bool(tree_flatten(module.trainable_parameters()))
