"""Rounding with feedback: what rounding one input channel does to the output is made good by the
channels that are still to be rounded (GPTQ, Frantar et al. 2023).

Works a group of channels at a time, since a group is what MLX packs with one scale and offset.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from internvl3_mlx.config import Quantization
from internvl3_mlx.convert.calibration.awq import InputRecorder
from internvl3_mlx.convert.calibration.bit_allocation import (
    HEAD,
    LAYER_UNITS,
    embed_sample,
    get_module,
)
from internvl3_mlx.convert.calibration.data import CalibrationSample
from internvl3_mlx.convert.row_reader import dequantize_parts
from internvl3_mlx.models.internvl import InternVL

DAMPING = 0.01  # of the mean diagonal: keeps the inverse of few samples' statistics steady
MIN_SCALE = 1e-12  # a scale below this belongs to a group of equal weights

QuantizedWeight = tuple[mx.array, mx.array, mx.array]  # words, scales, biases, as MLX keeps them


def gptq_quantize(
    model: InternVL,
    samples: Sequence[CalibrationSample],
    forms: Mapping[str, Quantization],
    dtype: mx.Dtype,
) -> Iterator[tuple[str, QuantizedWeight]]:
    """Round the decoder's linears in place, layer by layer, each on what the layers before it now
    give; yield how they are packed. The embedding is looked up, not multiplied: it stays."""
    language = model.language_model
    rows = [embed_sample(model, sample) for sample in samples]

    def forward(layer: Any) -> list[mx.array]:
        given = [
            layer(x, language.rotary(0, len(sample.token_ids)), None)
            for x, sample in zip(rows, samples, strict=True)
        ]
        mx.eval(given)
        return given

    for number, layer in enumerate(language.model.layers):
        for unit in LAYER_UNITS:
            paths = [f"language_model.model.layers.{number}.{name}" for name in unit]
            if all(is_affine(forms.get(path)) for path in paths):
                moment = record_hessian(model, paths[0], lambda: forward(layer))  # noqa: B023
                for path in paths:
                    yield path, quantize_module(model, path, moment, forms[path], dtype)
        rows = forward(layer)
    if is_affine(forms.get(HEAD)):
        states = [language.model.norm(x)[0] for x in rows]
        moment = compute_hessian(mx.concatenate(states, axis=0))
        yield HEAD, quantize_module(model, HEAD, moment, forms[HEAD], dtype)


def is_affine(form: Quantization | None) -> bool:
    return form is not None and form.mode == "affine"


def record_hessian(model: InternVL, path: str, forward: Any) -> np.ndarray:
    """Run ``forward`` and sum the second moment of what the linear at ``path`` was given."""
    parent, _, name = path.rpartition(".")
    owner = get_module(model, parent)
    recorder = InputRecorder(owner[name])
    owner[name] = recorder
    forward()
    owner[name] = recorder._layer
    return compute_hessian(recorder.inputs())


def compute_hessian(inputs: mx.array) -> np.ndarray:
    """(rows, in) -> (in, in)."""
    x = np.asarray(inputs.astype(mx.float32), dtype=np.float64)
    return x.T @ x


def quantize_module(
    model: InternVL, path: str, moment: np.ndarray, form: Quantization, dtype: mx.Dtype
) -> QuantizedWeight:
    module = get_module(model, path)
    packed = quantize_weight(module.weight.astype(dtype), moment, form)
    module.weight = dequantize_parts(packed, form).astype(module.weight.dtype)
    return packed


def quantize_weight(weight: mx.array, moment: np.ndarray, form: Quantization) -> QuantizedWeight:
    """Pack ``weight`` (out, in) with the least change of its output.

    ``moment``: (in, in), the inputs' second moment. Each group's scale and offset are MLX's own for
    the weights as they are when their turn comes.
    """
    rest = np.array(weight.astype(mx.float32), dtype=np.float64)
    upper = inverse_cholesky(moment)
    levels = np.empty(rest.shape, dtype=np.uint8)
    grids = []
    for start in range(0, rest.shape[1], form.group_size):
        stop = start + form.group_size
        scales, biases = group_scales(rest[:, start:stop], form, weight.dtype)
        grids.append((scales, biases))
        scale, offset = (np.asarray(x.astype(mx.float32), dtype=np.float64) for x in grids[-1])
        scale = np.where(np.abs(scale) < MIN_SCALE, MIN_SCALE, scale)
        errors = np.empty((rest.shape[0], form.group_size))
        for at in range(start, stop):
            level = np.clip(np.round((rest[:, at] - offset) / scale), 0, 2**form.bits - 1)
            levels[:, at] = level
            error = (rest[:, at] - level * scale - offset) / upper[at, at]
            rest[:, at:stop] -= np.outer(error, upper[at, at:stop])
            errors[:, at - start] = error
        rest[:, stop:] -= errors @ upper[start:stop, stop:]
    scales, biases = (mx.stack([pair[i] for pair in grids], axis=1) for i in range(2))
    return pack_levels(levels, form.bits), scales, biases


def inverse_cholesky(moment: np.ndarray) -> np.ndarray:
    """Factor the damped inverse: upper triangular U with U^T U = H^-1."""
    damped = moment + DAMPING * np.mean(np.diag(moment)) * np.eye(len(moment))
    factor: np.ndarray = np.linalg.cholesky(np.linalg.inv(damped)).T
    return factor


def group_scales(
    weight: np.ndarray, form: Quantization, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """Ask MLX for the scale and offset of one group of channels: (out, group) -> (out,) each."""
    x = mx.array(weight.astype(np.float32)).astype(dtype)
    _, scales, biases = mx.quantize(x, group_size=form.group_size, bits=form.bits)
    return scales[:, 0], biases[:, 0]


def pack_levels(levels: np.ndarray, bits: int) -> mx.array:
    """Pack levels as MLX does: each row one stream of bits, the lowest first, in 32-bit words."""
    stream = np.unpackbits(levels[:, :, None], axis=2, count=bits, bitorder="little")
    data = np.packbits(stream.reshape(len(levels), -1), axis=1, bitorder="little")
    return mx.array(data.view(np.uint32))
