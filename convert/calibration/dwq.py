"""Learned scales: packed numbers stay, their scales and offsets are trained until the packed model
answers as the 16-bit one does (distillation, as mlx-lm's DWQ does it).

What is trained is relative, scale (1 + a) and offset + scale c, so that one learning rate fits all.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from internvl3_mlx.config import Quantization
from internvl3_mlx.convert.calibration.bit_allocation import get_module
from internvl3_mlx.convert.calibration.data import CalibrationSample
from internvl3_mlx.convert.calibration.gptq import QuantizedWeight
from internvl3_mlx.convert.calibration.metrics import kl_divergence, log_softmax
from internvl3_mlx.convert.row_reader import dequantize_parts
from internvl3_mlx.device import on_cpu
from internvl3_mlx.models.internvl import InternVL

LEARNING_RATE = 1e-4
BATCH = 4  # samples whose gradients make one step
ORDER_SEED = 0
KINDS = ("weight", "scales", "biases")  # the mx formats have no biases


@dataclass(frozen=True)
class Step:
    """One update done, and the KL it started from."""

    number: int
    total: int
    kl: float


class Learned(nn.Module):
    """A packed matrix whose scales and offsets can be trained; also an embedding."""

    def __init__(
        self, module: nn.Module, form: Quantization, packed: QuantizedWeight | None = None
    ):
        super().__init__()
        words, scales, biases = packed or mx.quantize(
            module.weight, group_size=form.group_size, bits=form.bits
        )
        self._form, self._words = form, words
        # 32 bits while they are learned: the optimizer's squares vanish in 16
        self._scales, self._biases = scales.astype(mx.float32), biases.astype(mx.float32)
        self.stretch, self.shift = mx.zeros_like(self._scales), mx.zeros_like(self._scales)
        self._bias = module.get("bias")

    @property
    def scales(self) -> mx.array:
        return self._scales * (1 + self.stretch)

    @property
    def biases(self) -> mx.array:
        return self._biases + self._scales * self.shift

    def dense(self) -> mx.array:
        return dequantize_parts((self._words, self.scales, self.biases), self._form)

    def __call__(self, x: mx.array) -> mx.array:
        if mx.issubdtype(x.dtype, mx.integer):
            return self.dense()[x]
        y = self.as_linear(x)
        return y if self._bias is None else y + self._bias

    def as_linear(self, x: mx.array) -> mx.array:
        """Multiply packed where that is quick, dense where it is not; the same numbers."""
        if on_cpu():
            return x @ self.dense().T
        scales, biases = self.scales.astype(x.dtype), self.biases.astype(x.dtype)
        form, parts = self._form, (self._words, scales, biases)
        return mx.quantized_matmul(
            x, *parts, transpose=True, group_size=form.group_size, bits=form.bits
        )

    def tensors(self, dtype: mx.Dtype) -> dict[str, mx.array]:
        scales, biases = self.scales.astype(dtype), self.biases.astype(dtype)
        return {"weight": self._words, "scales": scales, "biases": biases}


def learn(
    model: InternVL,
    samples: Sequence[CalibrationSample],
    wanted: Sequence[mx.array],
    forms: Mapping[str, Quantization],
    *,
    epochs: int,
    packed: Mapping[str, QuantizedWeight] | None = None,
) -> Iterator[Step]:
    """Pack the modules of ``forms`` in place and train them; yield at every update.

    ``packed`` are modules that were rounded already; their scales are trained on. The
    tower is not trained: its pictures are looked at once, so pack it with ``pack_fixed`` before.
    Afterwards ``learned_tensors`` has what is to be written.
    """
    features = [seen(model, sample) for sample in samples]
    chosen = {path: form for path, form in forms.items() if is_learned(path, form)}
    for path, form in chosen.items():
        given = (packed or {}).get(path)
        replace_module(model, path, Learned(get_module(model, path), form, given))
    model.freeze()
    for path in chosen:
        get_module(model, path).unfreeze(recurse=False)
    steps = [order for epoch in range(epochs) for order in batches(len(samples), epoch)]
    rate = optim.cosine_decay(LEARNING_RATE, max(len(steps), 1))
    optimizer = optim.Adam(learning_rate=rate)

    def loss(model: InternVL, index: int) -> mx.array:
        sample = samples[index]
        language = model.language_model
        x = model.embed(sample.input_ids, features[index])
        states = language.model(x, language.rotary(0, len(sample.token_ids)))[
            0, sample.first_scored : -1
        ]
        return kl_divergence(log_softmax(wanted[index]), log_softmax(language.head(states))).mean()

    value_and_grad = nn.value_and_grad(model, loss)
    for number, order in enumerate(steps, start=1):
        total, grads = 0.0, None
        for index in order:
            value, new = value_and_grad(model, index)
            grads = new if grads is None else tree_map(mx.add, grads, new)
            mx.eval(value, grads)
            total += value.item()
        grads = tree_map(partial(mx.multiply, 1 / len(order)), grads)
        optimizer.update(model, grads)
        mx.eval(model.trainable_parameters(), optimizer.state)
        yield Step(number, len(steps), total / len(order))


def is_learned(path: str, form: Quantization) -> bool:
    return path.startswith("language_model.") and form.mode == "affine"


def quantize_modules(
    model: InternVL, forms: Mapping[str, Quantization], dtype: mx.Dtype
) -> dict[str, mx.array]:
    """Pack in place what is not trained; return it under the names it is written with."""
    written: dict[str, mx.array] = {}
    for path, form in forms.items():
        if is_learned(path, form):
            continue
        module = get_module(model, path)
        weight = module.weight.astype(dtype)
        parts = mx.quantize(weight, group_size=form.group_size, bits=form.bits, mode=form.mode)
        written |= {f"{path}.{kind}": x for kind, x in zip(KINDS, parts, strict=False)}
        module.weight = dequantize_parts(parts, form).astype(module.weight.dtype)
    return written


def seen(model: InternVL, sample: CalibrationSample) -> mx.array | None:
    if sample.tiles is None:
        return None
    features = model.get_image_features(mx.array(sample.tiles))
    mx.eval(features)
    return features


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    get_module(model, parent)[name] = module


def batches(count: int, epoch: int) -> list[list[int]]:
    """Shuffle the samples and cut them into steps."""
    key = mx.random.key(ORDER_SEED + epoch)
    order: Any = mx.random.permutation(count, key=key).tolist()
    return [order[i : i + BATCH] for i in range(0, count, BATCH)]


def learned_tensors(
    model: InternVL, forms: Mapping[str, Quantization], dtype: mx.Dtype
) -> dict[str, mx.array]:
    """Collect what was learned, under the names it is written with."""
    return {
        f"{path}.{kind}": x
        for path, form in forms.items()
        if is_learned(path, form)
        for kind, x in get_module(model, path).tensors(dtype).items()
    }
