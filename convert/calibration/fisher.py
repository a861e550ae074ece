"""Estimate how much quantizing each module changes the answers, from one backward pass.

For a small change dW of a weight, the KL divergence of the next-token distribution is about half
the quadratic form of dW with the Fisher information. Its diagonal is, for a linear layer with
inputs x and gradients g of log p(y) at its outputs, y drawn from the model itself, the sum over
tokens of g_i^2 x_j^2. Source: arXiv 1412.1193 (section 5); used for bit allocation in 2306.07629.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from internvl3_mlx.config import Quantization
from internvl3_mlx.convert.calibration.bit_allocation import (
    EMBEDDING,
    Sensitivity,
    Unit,
    candidates,
    fake_quantize,
    get_module,
    quantized_bits,
)
from internvl3_mlx.convert.calibration.data import CalibrationSample
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.models.lora import replace_module

SEED = 11  # of the tokens drawn from the model
DRAWS = 2  # backward passes of each sample


class OutputProbe(nn.Module):
    """Wraps a layer: adds ``offset`` to its outputs, for their gradient, and records its inputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = layer
        self._offset: mx.array | None = None
        self._input: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        self._input = x
        y: mx.array = self._layer(x)
        return y if self._offset is None else y + self._offset

    def as_linear(self, x: mx.array) -> mx.array:
        """Serve as a tied head: the change of the embedding there is not estimated."""
        head: mx.array = self._layer.as_linear(x)
        return head

    @property
    def weight(self) -> mx.array:
        """Return the layer's weight."""
        return self._layer.weight


def estimate_sensitivities(
    model: InternVL, samples: Sequence[CalibrationSample], min_bits: Mapping[Unit, int]
) -> Iterator[Sensitivity]:
    """Estimate every unit at every candidate quantization; the model stays as it is.

    min_bits: the units, and the fewest bits that each may get.
    """
    paths = [path for unit in min_bits for path in unit]
    information = fisher_diagonals(model, samples, paths)
    tokens = sum(len(sample.token_ids) - sample.first_scored - 1 for sample in samples)
    for unit, bits in min_bits.items():
        weights = [get_module(model, path).weight for path in unit]
        for quantization in candidates(weights[0].shape[1], min_bits=bits):
            kl = sum(
                estimated_kl(weight, information[path], quantization) / max(tokens, 1)
                for path, weight in zip(unit, weights, strict=True)
            )
            num_bits = sum(quantized_bits(weight.shape, quantization) for weight in weights)
            yield Sensitivity(unit, quantization, num_bits, kl)


def estimated_kl(weight: mx.array, information: mx.array, quantization: Quantization) -> float:
    """Return half the quadratic form of the rounding errors. information: as ``weight``."""
    error = fake_quantize(weight, quantization).astype(mx.float32) - weight.astype(mx.float32)
    total = 0.5 * (mx.square(error) * information).sum()
    return float(total.item())  # type: ignore[arg-type]


def fisher_diagonals(
    model: InternVL, samples: Sequence[CalibrationSample], paths: Sequence[str]
) -> dict[str, mx.array]:
    """Return the diagonal of the Fisher information of each weight, summed over all tokens."""
    probes = {path: OutputProbe(get_module(model, path)) for path in paths}
    found: dict[str, mx.array] = {}
    try:
        for path, probe in probes.items():
            replace_module(model, path, probe)
        key = mx.random.key(SEED)
        for sample in samples:
            for _ in range(DRAWS):
                key, drawn = mx.random.split(key)
                add_sample(model, sample, probes, found, drawn)
    finally:
        for path, probe in probes.items():
            replace_module(model, path, probe._layer)
    zeros = {path: mx.zeros(probe.weight.shape) for path, probe in probes.items()}
    return {path: found.get(path, zeros[path]) / DRAWS for path in paths}


def add_sample(
    model: InternVL,
    sample: CalibrationSample,
    probes: Mapping[str, OutputProbe],
    found: dict[str, mx.array],
    key: mx.array,
) -> None:
    """Add the information of one sample with one draw of its next tokens."""
    set_offsets(probes, {})
    labels = mx.random.categorical(scored_logits(model, sample), key=key)
    inputs = {path: probe._input for path, probe in probes.items() if probe._input is not None}
    reached = {path: probes[path] for path in inputs}
    offsets = {
        path: mx.zeros(output_shape(path, inputs[path], probe.weight))
        for path, probe in reached.items()
    }
    mx.eval(labels, offsets, inputs)
    gradients = mx.grad(partial(log_likelihood, model, sample, labels, reached))(offsets)
    for path, gradient in gradients.items():
        squares = mx.square(gradient.reshape(-1, gradient.shape[-1]).astype(mx.float32))
        added = one_weight(path, inputs[path], squares, probes[path].weight.shape)
        found[path] = found[path] + added if path in found else added
        mx.eval(found[path])
    for probe in probes.values():
        probe._input = probe._offset = None


def output_shape(path: str, x: mx.array, weight: mx.array) -> tuple[int, ...]:
    """Return the shape of a layer's output for the input x."""
    return (*x.shape, weight.shape[1]) if path == EMBEDDING else (*x.shape[:-1], weight.shape[0])


def one_weight(path: str, x: mx.array, squares: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Return sum over tokens of g_i^2 x_j^2: (out, in); of an embedding, g^2 of the rows used."""
    if path == EMBEDDING:
        return mx.zeros(shape).at[x.reshape(-1)].add(squares)
    return squares.T @ mx.square(x.reshape(-1, x.shape[-1]).astype(mx.float32))


def log_likelihood(
    model: InternVL,
    sample: CalibrationSample,
    labels: mx.array,
    probes: Mapping[str, OutputProbe],
    offsets: Mapping[str, mx.array],
) -> mx.array:
    """Return the log-likelihood of ``labels`` as a function of the offsets."""
    set_offsets(probes, offsets)
    logits = scored_logits(model, sample)
    chosen = mx.take_along_axis(logits, labels[:, None], axis=-1).sum()
    return chosen - mx.logsumexp(logits, axis=-1).sum()


def set_offsets(probes: Mapping[str, OutputProbe], offsets: Mapping[str, mx.array]) -> None:
    for path, probe in probes.items():
        probe._offset = offsets.get(path)


def scored_logits(model: InternVL, sample: CalibrationSample) -> mx.array:
    """Return the logits after each scored token: (K, vocab) float32."""
    features = None
    if sample.tiles is not None:
        features = model.encode_tiles(mx.array(sample.tiles))
    language, length = model.language_model, len(sample.token_ids)
    states = language.model(model.embed(sample.input_ids, features), language.rotary(0, length))
    return language.head(states[0, sample.first_scored : -1]).astype(mx.float32)
