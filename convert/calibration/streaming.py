"""Run a model one layer at a time: each layer is read, used for all samples, and dropped.

Memory then holds one layer, the embedding and the states, whatever the size of the model.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from internvl3_mlx.checkpoints.build_model import LoadedModel
from internvl3_mlx.convert.calibration.data import CalibrationSample
from internvl3_mlx.convert.calibration.metrics import log_softmax
from internvl3_mlx.device import on_cpu
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.models.lora import dequantized_weight, linear_shape, replace_module


def stream_log_probs(
    loaded: LoadedModel, samples: Sequence[CalibrationSample], tick: Callable[[], None]
) -> list[mx.array]:
    """Return the log-probabilities after each scored token of each sample: (K, vocab) float32.

    The model is used up: its layers are dropped on the way. ``tick`` is called after every layer
    and may raise to stop.
    """
    model, language = loaded.model, loaded.model.language_model
    states = embed_samples(model, samples, tick)
    rotary = [language.rotary(0, len(sample.token_ids)) for sample in samples]
    layers: list[Any] = language.model.layers
    for number, layer in enumerate(layers):
        dequantize_on_cpu(layer)
        states = [layer(x, r) for x, r in zip(states, rotary, strict=True)]
        mx.eval(states)
        layers[number] = None
        tick()
    if "lm_head" in language:
        dequantize_on_cpu(language)
    found = []
    for x, sample in zip(states, samples, strict=True):
        scored = language.model.norm(x)[0, sample.first_scored : -1]
        found.append(log_softmax(language.head(scored)))
        mx.eval(found[-1])
        tick()
    return found


def dequantize_on_cpu(module: nn.Module) -> None:
    """Replace a module's quantized linear layers by dense ones of the same values, on a CPU.

    Multiplying many tokens with quantized weights takes MLX's CPU several times as long.
    """
    if not on_cpu():
        return
    for path, layer in [*module.named_modules()]:
        if isinstance(layer, nn.QuantizedLinear):
            rows, columns = linear_shape(layer)
            dense = nn.Linear(columns, rows, bias="bias" in layer)
            dense.weight = dequantized_weight(layer)
            if "bias" in layer:
                dense.bias = layer.bias
            replace_module(module, path, dense)


def embed_samples(
    model: InternVL, samples: Sequence[CalibrationSample], tick: Callable[[], None]
) -> list[mx.array]:
    """Return the embeddings of every sample, image features included: (1, L, D) each."""

    def run(block: Any, x: mx.array, *rest: Any) -> mx.array:
        dequantize_on_cpu(block)
        y: mx.array = block(x, *rest)
        mx.eval(y)
        block.clear()
        tick()
        return y

    tiles = [sample.tiles for sample in samples if sample.tiles is not None]
    features = None
    if tiles:
        pixels = mx.concatenate([mx.array(tile) for tile in tiles])
        features = model.project(model.vision_model(pixels, model.config.select_layer, run=run))
        mx.eval(features)
    states, at = [], 0
    for sample in samples:
        count = 0 if sample.tiles is None else len(sample.tiles)
        own = features[at : at + count] if features is not None and count else None
        states.append(model.embed(sample.input_ids, own))
        at += count
    mx.eval(states)
    return states
