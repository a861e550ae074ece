"""MLX's optimizers by name, learning rate schedules, gradient clipping and weight decay.

The optimizer updates float32 master weights whatever the compute dtype: an update of 1e-5 would be
lost when added to a 16-bit number.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_map, tree_reduce

from internvl3_mlx.errors import UserError
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.params import Arrays, Tree

STEP = "step"  # in the state of an optimizer: how many steps it has made
EPSILON = 1e-6  # avoids dividing by zero when the gradient is 0

# none of them decays weights itself: ``decay_weights`` does so in the same way for all
OPTIMIZERS: Mapping[str, Callable[[float], optim.Optimizer]] = MappingProxyType({
    "adamw": partial(optim.Adam, bias_correction=True),  # as in PyTorch; off by default in MLX
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


def build_optimizer(config: TrainConfig) -> optim.Optimizer:
    """Build the configured optimizer; its learning rate is set before every update."""
    return OPTIMIZERS[config.optimizer](config.learning_rate)


def learning_rate_at(config: TrainConfig, update: int, total_updates: int) -> float:
    """Return the learning rate of an update, counted from 1.

    It warms up linearly to the peak and then follows the schedule. The final value would belong to
    the update after the last one, so no update is spent at a learning rate of 0.
    """
    warmup = warmup_updates(config, total_updates)
    if update <= warmup:
        return config.learning_rate * update / warmup
    progress = min((update - 1 - warmup) / max(total_updates - warmup, 1), 1.0)
    factor = SCHEDULES[config.lr_schedule](progress)
    return config.learning_rate * (config.lr_end + (1 - config.lr_end) * factor)


def warmup_updates(config: TrainConfig, total_updates: int) -> int:
    """Return the number of warmup updates: given directly, or as a share of all updates."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return math.ceil(config.warmup_ratio * total_updates)


def linear(progress: float) -> float:
    """Decay linearly from 1 to 0."""
    return 1 - progress


def cosine(progress: float) -> float:
    """Decay from 1 to 0 along half a cosine."""
    return (1 + math.cos(math.pi * progress)) / 2


def constant(_: float) -> float:
    """Stay at 1."""
    return 1.0


# fraction of the peak learning rate by the fraction of the updates after warmup that are done
SCHEDULES: Mapping[str, Callable[[float], float]] = MappingProxyType({
    "cosine": cosine, "linear": linear, "constant": constant,
})  # fmt: skip


def global_norm(gradients: Tree) -> mx.array:
    """Compute the L2 norm over all gradients together, in float32: -> scalar."""
    total: mx.array = tree_reduce(
        lambda sum_so_far, g: sum_so_far + g.astype(mx.float32).square().sum(),
        gradients,
        mx.array(0.0),
    )
    return mx.sqrt(total)


def clip_gradients(gradients: Tree, norm: mx.array, max_norm: float) -> Tree:
    """Scale gradients of norm ``norm`` down to ``max_norm``; 0 disables clipping."""
    if not max_norm:
        return gradients
    scale = mx.minimum(max_norm / (norm + EPSILON), 1.0)
    return tree_map(lambda g: g * scale, gradients)


def decay_weights(weights: Tree, rate: float) -> Tree:
    """Apply decoupled weight decay to matrices; biases, norms and scales are left unchanged."""
    if not rate:
        return weights
    return tree_map(lambda w: w * (1 - rate) if w.ndim > 1 else w, weights)


VISION, PROJECTOR, LORA_B = "vision_model.", "mlp1.", "lora_B"


def rate_factor(config: TrainConfig, name: str) -> float:
    """Return what the learning rate of a weight is multiplied by: for its part, and LoRA+ for B.

    LoRA+: arXiv 2402.12354.
    """
    own = {VISION: config.vision_learning_rate, PROJECTOR: config.projector_learning_rate}
    asked = next((rate for part, rate in own.items() if name.startswith(part)), None)
    factor = 1.0 if asked is None or not config.learning_rate else asked / config.learning_rate
    return factor * (config.lora_plus_ratio if name.endswith(LORA_B) else 1.0)


def check_part_rates(config: TrainConfig, names: Collection[str]) -> None:
    """Raise UserError for the learning rate of a part of which no weight is trained."""
    parts = {"vision_learning_rate": VISION, "projector_learning_rate": PROJECTOR}
    for setting, part in parts.items():
        rate = getattr(config, setting)
        if rate is not None and not any(name.startswith(part) for name in names):
            raise UserError(
                f"{setting} is {rate:g}, but no weight of {part.rstrip('.')} is trained; add it to "
                "train or lora_keys, or drop the setting"
            )


def rate_groups(config: TrainConfig, names: Iterable[str], rate: float) -> dict[float, list[str]]:
    """Group the names of weights by their learning rate. rate: of a weight without its own."""
    groups: dict[float, list[str]] = {}
    for name in names:
        groups.setdefault(rate * rate_factor(config, name), []).append(name)
    return groups


def optimizer_step(
    optimizer: optim.Optimizer,
    weights: Arrays,
    gradients: Arrays,
    groups: Mapping[float, Sequence[str]],
    weight_decay: float,
) -> Arrays:
    """Return the weights after one step. groups: learning rate -> names of weights.

    The groups together are one step of the optimizer: each starts from the same count.
    """
    before = dict(optimizer.state)
    counted = {key: before[key] for key in (STEP,) if key in before}
    updated: Arrays = {}
    for rate, names in groups.items():
        optimizer.state |= counted
        optimizer.learning_rate = rate
        own = decay_weights({name: weights[name] for name in names}, rate * weight_decay)
        updated |= optimizer.apply_gradients({name: gradients[name] for name in names}, own)
    return {name: updated[name] for name in weights}


def master_weights(weights: Arrays) -> Arrays:
    """Return float32 versions of the weights; arrays that are float32 already are not copied."""
    return {name: w.astype(mx.float32) for name, w in weights.items()}
