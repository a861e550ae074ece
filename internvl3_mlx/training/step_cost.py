"""How long an update takes, roughly: operations and bytes over what this machine does."""

import time
from functools import cache

import mlx.core as mx
import mlx.nn as nn

from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.models.lora import linear_shape
from internvl3_mlx.training.activation_memory import (
    BatchShape,
    base_of,
    decoder_block_bytes,
    element_bytes,
    first_trained_layer,
)
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.grad_checkpoint import is_trainable

PROBE_ROWS, PROBE_WIDTH, PROBE_ROUNDS = 512, 1024, 4
PROBE_ELEMENTS = 1 << 21
TOUCHES = 3.0  # how often a kept byte is written or read, forward and backward
OPERATIONS = 2  # a multiplication and an addition


def seconds_per_update(model: InternVL, shape: BatchShape, config: TrainConfig) -> float:
    """Predict the seconds of one micro-step, without reading data or encoding frozen images."""
    speed, bandwidth = machine_speed(mx.float32 if element_bytes(model) == 4 else mx.bfloat16)
    return step_operations(model, shape, config) / speed + touched_bytes(model, shape) / bandwidth


def step_operations(model: InternVL, shape: BatchShape, config: TrainConfig) -> float:
    """Count the operations of a forward and backward pass."""
    text, layers = model.config.text, model.language_model.model.layers
    first = first_trained_layer(model)
    forward = sum(map(linear_operations, layers))
    reached = sum(map(linear_operations, layers[first:]))
    trained = sum(x.size for _, x in _trained(model))
    passes = forward + reached + reached * config.grad_checkpoint
    decoder = shape.tokens * (passes + OPERATIONS * trained)
    scores = OPERATIONS * text.num_attention_heads * text.head_dim * shape.longest * shape.tokens
    attention = scores * (len(layers) + 2.5 * (len(layers) - first))
    head = 2 * OPERATIONS * shape.targets * text.hidden_size * text.vocab_size
    return decoder + attention + head + tower_operations(model, shape)


def linear_operations(block: nn.Module) -> int:
    """Count the operations of a block's linear layers for one row."""
    shapes = [
        linear_shape(base_of(m)) for n, m in block.named_modules() if n.endswith(LINEAR_NAMES)
    ]
    return OPERATIONS * sum(out * inside for out, inside in shapes)


LINEAR_NAMES = ("_proj", ".qkv", ".proj", ".fc1", ".fc2")


def tower_operations(model: InternVL, shape: BatchShape) -> float:
    """Count the operations of a trained tower; a frozen one runs once for each image."""
    if not is_trainable(model.vision_model):
        return 0.0
    vision = model.config.vision
    rows = vision.grid**2 + 1
    forward = rows * sum(map(linear_operations, model.vision_model.encoder.layers))
    attention = 2 * OPERATIONS * vision.num_hidden_layers * rows**2 * vision.hidden_size
    return 3.0 * shape.tiles * (forward + attention)


def touched_bytes(model: InternVL, shape: BatchShape) -> float:
    """Count the bytes that elementwise operations read and write."""
    width = element_bytes(model)
    first = first_trained_layer(model)
    kept = [
        decoder_block_bytes(block, shape.tokens, shape.tokens, width, 0.0)
        for block in model.language_model.model.layers[first:]
    ]
    return TOUCHES * sum(kept)


def _trained(model: InternVL) -> list[tuple[str, mx.array]]:
    from internvl3_mlx.training.params import named_arrays

    return named_arrays(model.trainable_parameters())


@cache
def machine_speed(dtype: mx.Dtype) -> tuple[float, float]:
    """Measure operations per second in a product, and bytes per second in an elementwise function.

    It takes a fraction of a second, once.
    """
    x = mx.zeros((PROBE_ROWS, PROBE_WIDTH), dtype=dtype)
    w = mx.zeros((PROBE_WIDTH, PROBE_WIDTH), dtype=dtype)
    y = mx.zeros(PROBE_ELEMENTS)
    mx.eval(x @ w, mx.sigmoid(y))
    product = PROBE_ROUNDS * OPERATIONS * PROBE_ROWS * PROBE_WIDTH**2
    started = time.perf_counter()
    for _ in range(PROBE_ROUNDS):
        mx.eval(x @ w)
    middle = time.perf_counter()
    for _ in range(PROBE_ROUNDS):
        mx.eval(mx.sigmoid(y))
    ended = time.perf_counter()
    return product / (middle - started), PROBE_ROUNDS * y.nbytes / (ended - middle)
