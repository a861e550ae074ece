"""GPTQ (Frantar et al. 2023): rounding with error feedback.

The error that rounding one input channel causes in a layer's output is compensated by the channels
that have not been rounded yet. Channels are rounded one group at a time, because MLX stores one
scale and one bias for each group.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from internvl3_mlx.config import Quantization
from internvl3_mlx.convert.calibration.bit_allocation import (
    HEAD,
    LAYER_UNITS,
    embed_sample,
    get_module,
)
from internvl3_mlx.convert.calibration.data import CalibrationSample
from internvl3_mlx.convert.row_reader import dequantize_array, quantize_array
from internvl3_mlx.models.internvl import InternVL

DAMPING = 0.01  # of the mean diagonal: keeps the inverse stable when there are few samples
MIN_SCALE = 1e-12  # a smaller scale belongs to a group of equal weights

QuantizedWeight = tuple[
    mx.array, mx.array, mx.array
]  # words, scales and biases, as MLX stores them


def gptq_quantize(
    model: InternVL,
    samples: Sequence[CalibrationSample],
    quantizations: Mapping[str, Quantization],
    dtype: mx.Dtype,
) -> Iterator[tuple[str, QuantizedWeight]]:
    """Round the decoder's linear layers in place and yield them quantized.

    Each layer is rounded on what the already rounded layers before it produce. The embedding is
    looked up and not multiplied, so it is left alone. ``dtype`` is that of the scales and biases.
    """
    language = model.language_model
    states = [embed_sample(model, sample) for sample in samples]

    def forward(layer: Any) -> list[mx.array]:
        outputs = [
            layer(x, language.rotary(0, len(sample.token_ids)))
            for x, sample in zip(states, samples, strict=True)
        ]
        mx.eval(outputs)
        return outputs

    for number, layer in enumerate(language.model.layers):
        for unit in LAYER_UNITS:
            paths = [f"language_model.model.layers.{number}.{name}" for name in unit]
            if all(is_affine(quantizations.get(path)) for path in paths):
                hessian = record_hessian(model, paths[0], lambda: forward(layer))  # noqa: B023
                for path in paths:
                    yield path, quantize_module(model, path, hessian, quantizations[path], dtype)
        states = forward(layer)
    if is_affine(quantizations.get(HEAD)):
        normalized = [language.model.norm(x)[0] for x in states]
        hessian = compute_hessian(mx.concatenate(normalized, axis=0))
        yield HEAD, quantize_module(model, HEAD, hessian, quantizations[HEAD], dtype)


def is_affine(quantization: Quantization | None) -> bool:
    return quantization is not None and quantization.mode == "affine"


class InputRecorder(nn.Module):
    """Wraps a linear layer and records its inputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = layer
        self._inputs: list[mx.array] = []

    def __call__(self, x: mx.array) -> mx.array:
        self._inputs.append(x.reshape(-1, x.shape[-1]).astype(mx.float32))
        return self._layer(x)

    def inputs(self) -> mx.array:
        """Return all recorded inputs: (N, in) float32."""
        return mx.concatenate(self._inputs, axis=0)


def record_hessian(model: InternVL, path: str, forward: Callable[[], object]) -> np.ndarray:
    """Run ``forward`` and return the Hessian of the inputs of the linear layer at ``path``."""
    parent, _, name = path.rpartition(".")
    owner = get_module(model, parent)
    recorder = InputRecorder(owner[name])
    owner[name] = recorder
    forward()
    owner[name] = recorder._layer
    return compute_hessian(recorder.inputs())


def compute_hessian(inputs: mx.array) -> np.ndarray:
    """Return X^T X, the Hessian of the squared output error: (N, in) -> (in, in) float64."""
    x = np.asarray(inputs.astype(mx.float32), dtype=np.float64)
    return x.T @ x


def quantize_module(
    model: InternVL, path: str, hessian: np.ndarray, quantization: Quantization, dtype: mx.Dtype
) -> QuantizedWeight:
    """Quantize the module at ``path`` and give it the rounded weight."""
    module = get_module(model, path)
    parts = quantize_weight(module.weight.astype(dtype), hessian, quantization)
    module.weight = dequantize_array(parts, quantization).astype(module.weight.dtype)
    return parts


def quantize_weight(
    weight: mx.array, hessian: np.ndarray, quantization: Quantization
) -> QuantizedWeight:
    """Quantize ``weight`` (out, in) so that the layer's output changes least.

    ``hessian``: (in, in). The scale and bias of each group are those that MLX chooses for the
    weights as they are when their turn comes.
    """
    rest = np.array(weight.astype(mx.float32), dtype=np.float64)
    upper = inverse_cholesky(hessian)
    levels = np.empty(rest.shape, dtype=np.uint8)
    groups = []
    for start in range(0, rest.shape[1], quantization.group_size):
        stop = start + quantization.group_size
        groups.append(group_scales(rest[:, start:stop], quantization, weight.dtype))
        scale, bias = (np.asarray(x.astype(mx.float32), dtype=np.float64) for x in groups[-1])
        scale = np.where(np.abs(scale) < MIN_SCALE, MIN_SCALE, scale)
        errors = np.empty((rest.shape[0], quantization.group_size))
        for at in range(start, stop):
            level = np.clip(np.round((rest[:, at] - bias) / scale), 0, 2**quantization.bits - 1)
            levels[:, at] = level
            error = (rest[:, at] - level * scale - bias) / upper[at, at]
            rest[:, at:stop] -= np.outer(error, upper[at, at:stop])
            errors[:, at - start] = error
        rest[:, stop:] -= errors @ upper[start:stop, stop:]
    scales, biases = (mx.stack([pair[i] for pair in groups], axis=1) for i in range(2))
    return pack_levels(levels, quantization.bits), scales, biases


def inverse_cholesky(hessian: np.ndarray) -> np.ndarray:
    """Factor the inverse of the damped Hessian: upper triangular U with U^T U = H^-1."""
    damped = hessian + DAMPING * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    factor: np.ndarray = np.linalg.cholesky(np.linalg.inv(damped)).T
    return factor


def group_scales(
    weight: np.ndarray, quantization: Quantization, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """Return MLX's scales and biases for one group of channels: (out, group) -> (out,) each."""
    x = mx.array(weight.astype(np.float32)).astype(dtype)
    _, scales, biases = quantize_array(x, quantization)
    return scales[:, 0], biases[:, 0]


def pack_levels(levels: np.ndarray, bits: int) -> mx.array:
    """Store levels the way MLX does: each row is one bit stream, lowest bit first, in 32-bit words.

    levels: (out, in) uint8 -> (out, in * bits / 32) uint32.
    """
    stream = np.unpackbits(levels[:, :, None], axis=2, count=bits, bitorder="little")
    data = np.packbits(stream.reshape(len(levels), -1), axis=1, bitorder="little")
    return mx.array(data.view(np.uint32))
