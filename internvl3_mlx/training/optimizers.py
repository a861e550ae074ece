"""MLX's optimizers by name, how far they step, and the clipping of gradients.

The optimizer moves float32 weights whatever the model computes in: a step of 1e-5 is lost when it
is added to a 16-bit number.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_map, tree_reduce

from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.params import Arrays, Tree

EPSILON = 1e-6  # a gradient of 0 has no direction to divide by

# none decays weights by itself: ``shrunk`` does, in the same way for all of them
OPTIMIZERS: Mapping[str, Callable[[float], optim.Optimizer]] = MappingProxyType({
    "adamw": partial(optim.Adam, bias_correction=True),  # as PyTorch's; MLX leaves it out
    "adam": partial(optim.Adam, bias_correction=True),
    "adamax": optim.Adamax,
    "adafactor": partial(optim.Adafactor, relative_step=False, scale_parameter=False),
    "adagrad": optim.Adagrad,
    "adadelta": optim.AdaDelta,
    "lion": optim.Lion,
    "muon": partial(optim.Muon, weight_decay=0.0),
    "rmsprop": optim.RMSprop,
    "sgd": partial(optim.SGD, momentum=0.9),
})  # fmt: skip


def build_optimizer(recipe: TrainConfig) -> optim.Optimizer:
    """Build the optimizer of a recipe; ``step_size`` is set before every update."""
    return OPTIMIZERS[recipe.optimizer](recipe.learning_rate)


def learning_rate_at(recipe: TrainConfig, update: int, updates: int) -> float:
    """Give the step size of one update of so many, counted from 1.

    It rises in a straight line to the highest, and falls by the schedule towards its end, which
    the update after the last would have: no update is wasted on a step of 0.
    """
    rising = warmup_updates(recipe, updates)
    if update <= rising:
        return recipe.learning_rate * update / rising
    done = min((update - 1 - rising) / max(updates - rising, 1), 1.0)
    fall = SCHEDULES[recipe.lr_schedule](done)
    return recipe.learning_rate * (recipe.lr_end + (1 - recipe.lr_end) * fall)


def warmup_updates(recipe: TrainConfig, updates: int) -> int:
    if recipe.warmup_steps is not None:
        return recipe.warmup_steps
    return math.ceil(recipe.warmup_ratio * updates)


def linear(done: float) -> float:
    return 1 - done


def cosine(done: float) -> float:
    return (1 + math.cos(math.pi * done)) / 2


def constant(_: float) -> float:
    return 1.0


# how much of the highest step size is left, by the share of the way that is done
SCHEDULES: Mapping[str, Callable[[float], float]] = MappingProxyType({
    "cosine": cosine, "linear": linear, "constant": constant,
})  # fmt: skip


def global_norm(gradients: Tree) -> mx.array:
    """Give the length of all gradients as one vector, summed in float32."""
    total: mx.array = tree_reduce(
        lambda so_far, g: so_far + g.astype(mx.float32).square().sum(), gradients, mx.array(0.0)
    )
    return mx.sqrt(total)


def clip_gradients(gradients: Tree, norm: mx.array, longest: float) -> Tree:
    """Shorten gradients of length ``norm`` to ``longest``; 0 leaves them as they are."""
    if not longest:
        return gradients
    scale = mx.minimum(longest / (norm + EPSILON), 1.0)
    return tree_map(lambda g: g * scale, gradients)


def decay_weights(weights: Tree, by: float) -> Tree:
    """Draw matrices towards 0 by a share of themselves; biases, norms and scales are left alone."""
    if not by:
        return weights
    return tree_map(lambda w: w * (1 - by) if w.ndim > 1 else w, weights)


def master_weights(weights: Arrays) -> Arrays:
    """Take arrays in float32; those that are so already are not copied."""
    return {name: w.astype(mx.float32) for name, w in weights.items()}
