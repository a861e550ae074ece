"""Low-rank adapters beside linear layers, dense or packed: LoRA, rsLoRA and DoRA.

The layer's own weight W stays as it is; two thin factors A (r, in) and B (out, r) add scale * B A
to it. DoRA then gives each row of the sum a trained length. Sources: arXiv 2106.09685, 2312.03732
and 2402.09353; initialisation, dropout and scaling are PEFT's, and so are the factors' names.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from internvl3_mlx.errors import KeyMapError


@dataclass(frozen=True, eq=False)
class LoRAWeights:
    """What an adapter does to one weight: ``scale * up @ down`` is added, then rows are stretched.

    down: (r, in), up: (out, r), magnitude: (out,) the rows' lengths, for DoRA alone; a row whose
    magnitude is NaN keeps the length of the weight's own row.
    """

    lora_a: mx.array
    lora_b: mx.array
    scale: float
    magnitude: mx.array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.lora_b.shape[0], self.lora_a.shape[1]

    def slice_rows(self, start: int, stop: int) -> "LoRAWeights":
        """Take what concerns rows ``start`` to ``stop`` of the weight."""
        magnitude = None if self.magnitude is None else self.magnitude[start:stop]
        return LoRAWeights(self.lora_a, self.lora_b[start:stop], self.scale, magnitude)

    def merged_into(self, weight: mx.array) -> mx.array:
        """Merge into dense rows, in float32. weight: (out, in) -> (out, in) float32."""
        own = weight.astype(mx.float32)
        up, down = self.lora_b.astype(mx.float32), self.lora_a.astype(mx.float32)
        changed = own + self.scale * (up @ down)
        if self.magnitude is None:
            return changed
        wanted = fill_nan(self.magnitude.astype(mx.float32), row_norms(own))
        return changed * (wanted / norms_from_squares(mx.square(changed).sum(axis=-1)))[:, None]


class LoRALinear(nn.Module):
    """A linear layer with an adapter. Only the adapter is trained.

    The factors are float32 whatever the layer computes in: bfloat16 would swallow small updates.
    The wide product with A runs in x's own type, so that no float32 copy of x is kept for the
    backward pass; everything of width r, and the sum with the layer's result, is float32.
    """

    def __init__(self, base: nn.Module, factors: LoRAWeights, dropout: float = 0.0):
        super().__init__()
        self.base = base.freeze()
        self.dropout, self.enabled = dropout, True
        if factors.magnitude is not None:
            self._squares = mx.square(dequantized_weight(base)).sum(
                axis=-1
            )  # once: W does not change
        self.load(factors)

    def load(self, weights: LoRAWeights) -> None:
        """Hold these factors from now on."""
        self.scale = weights.scale
        self.pop("_lengths", None)
        self.lora_A = weights.lora_a.astype(mx.float32)
        self.lora_B = weights.lora_b.astype(mx.float32)
        if weights.magnitude is not None:
            given = weights.magnitude.astype(mx.float32)
            self.lora_magnitude_vector = fill_nan(given, mx.sqrt(self._squares))

    @classmethod
    def from_base(
        cls, base: nn.Module, rank: int, scale: float, dropout: float = 0.0, *, dora: bool = False
    ) -> "LoRALinear":
        """Begin an adapter that changes nothing yet: A uniform within 1/sqrt(in), B zero."""
        out, width = linear_shape(base)
        bound = 1 / math.sqrt(width)
        down = mx.random.uniform(-bound, bound, (rank, width))
        own = mx.full((out,), math.nan) if dora else None
        return cls(base, LoRAWeights(down, mx.zeros((out, rank)), scale, own), dropout)

    def __call__(self, x: mx.array) -> mx.array:
        """x: (..., in) -> (..., out)"""
        y = self.base(x)
        if not self.enabled:
            return y
        drops = self.training and self.dropout > 0
        seen = dropout(x, self.dropout) if drops else x
        down = (seen @ self.lora_A.T.astype(x.dtype)).astype(mx.float32)
        added = (self.scale * down) @ self.lora_B.T
        if "lora_magnitude_vector" not in self:
            return (y + added).astype(y.dtype)
        ratio = self.lora_magnitude_vector / self.frozen_row_norms()
        own = matmul_weight(self.base, seen) if drops else subtract_bias(y, self.base)
        return (y + (ratio - 1) * own + ratio * added).astype(y.dtype)

    def frozen_row_norms(self) -> mx.array:
        """Give the rows' lengths, constants to every gradient: (out,)."""
        settled: mx.array | None = self.get("_lengths")
        return mx.stop_gradient(self.adapted_row_norms()) if settled is None else settled

    def finalize(self, dtype: mx.Dtype) -> None:
        """Work out once what changes no more: for a trained adapter, in a model of ``dtype``.

        Otherwise each token would read the weight twice for DoRA and cast A anew.
        """
        if "lora_magnitude_vector" in self:
            self._lengths = self.adapted_row_norms()
        self.lora_A = self.lora_A.astype(dtype)

    def adapted_row_norms(self) -> mx.array:
        """Measure the rows of W + scale * B A, (out,), without ever making them.

        |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b, and A W^T is a product like others.
        """
        a, b = self.lora_A, self.lora_B
        crossed = matmul_weight(self.base, a).astype(mx.float32).T
        mixed = 2 * self.scale * crossed + self.scale**2 * (b @ (a @ a.T))
        return norms_from_squares(self._squares + (b * mixed).sum(axis=-1))

    @property
    def weights(self) -> LoRAWeights:
        return LoRAWeights(self.lora_A, self.lora_B, self.scale, self.get("lora_magnitude_vector"))


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """Give a linear layer's (out, in), dense or packed."""
    if isinstance(linear, nn.QuantizedLinear):
        return linear.scales.shape[0], linear.scales.shape[1] * linear.group_size
    return linear.weight.shape[0], linear.weight.shape[1]


def dequantized_weight(linear: nn.Module) -> mx.array:
    """Give a linear layer's weight, (out, in) float32, unpacked if it is packed."""
    if not isinstance(linear, nn.QuantizedLinear):
        weight: mx.array = linear.weight
        return weight.astype(mx.float32)
    biases = linear.get("biases")
    return mx.dequantize(
        linear.weight,
        float32_unless_integer(linear.scales),
        None if biases is None else float32_unless_integer(biases),
        group_size=linear.group_size,
        bits=linear.bits,
        mode=linear.mode,
    ).astype(mx.float32)


def float32_unless_integer(x: mx.array) -> mx.array:
    """Make floats float32; the scales of the mx formats are bytes and stay so."""
    return x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x


def matmul_weight(linear: nn.Module, x: mx.array) -> mx.array:
    """Multiply by a layer's weight, leaving its bias out: (..., in) -> (..., out)."""
    if not isinstance(linear, nn.QuantizedLinear):
        return x @ linear.weight.T
    return mx.quantized_matmul(
        x,
        linear.weight,
        scales=linear.scales,
        biases=linear.get("biases"),
        transpose=True,
        group_size=linear.group_size,
        bits=linear.bits,
        mode=linear.mode,
    )


def subtract_bias(y: mx.array, linear: nn.Module) -> mx.array:
    return y - linear.bias if "bias" in linear else y


def dropout(x: mx.array, rate: float) -> mx.array:
    """Drop a share of the numbers and stretch the others, so that the mean stays."""
    return mx.where(mx.random.bernoulli(1 - rate, x.shape), x * (1 / (1 - rate)), 0)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Yield a model's adapted layers by their path."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield path, module


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` where the dotted ``path`` leads; numbers count in lists."""
    *steps, last = path.split(".")
    parent: nn.Module | list[nn.Module] = model
    for step in steps:
        parent = parent[int(step)] if isinstance(parent, list) else parent[step]
    if isinstance(parent, list):
        parent[int(last)] = module
    else:
        parent[last] = module


MIN_NORM = 1e-12  # a row's length that is divided by


def row_norms(rows: mx.array) -> mx.array:
    """Measure rows: (out, in) -> (out,)."""
    return mx.sqrt(mx.square(rows).sum(axis=-1))


def norms_from_squares(squares: mx.array) -> mx.array:
    """Take the root of squared lengths, never zero: a row of zeros is stretched to zeros."""
    return mx.sqrt(mx.maximum(squares, MIN_NORM**2))


def fill_nan(magnitude: mx.array, own: mx.array) -> mx.array:
    return mx.where(mx.isnan(magnitude), own, magnitude)


LoRARows = tuple[
    LoRAWeights | None, int, int
]  # rows from start to stop of one that is changed, or not


def concatenate_lora(parts: Sequence[LoRARows]) -> LoRAWeights:
    """Join rows of several adapters. One and the same A is kept once, others stand in blocks."""
    whole = [factors for factors, _, _ in parts if factors is not None]
    adding = [factors for factors in whole if factors.lora_a.shape[0]]
    blocks, first = unique_by_lora_a(adding), adding[0]
    scale = first.scale if all(factors.scale == first.scale for factors in adding) else 1.0
    ups = [block_lora_b(part, blocks, scale) for part in parts]
    down = mx.concatenate([block.lora_a for block in blocks]) if len(blocks) > 1 else first.lora_a
    magnitude = None
    if any(factors.magnitude is not None for factors in whole):
        magnitude = mx.concatenate([slice_magnitude(part) for part in parts])
    return LoRAWeights(down, mx.concatenate(ups) if len(ups) > 1 else ups[0], scale, magnitude)


def unique_by_lora_a(whole: Sequence[LoRAWeights]) -> list[LoRAWeights]:
    """List adapters whose A differ, in order."""
    found: list[LoRAWeights] = []
    for factors in whole:
        if not any(same_lora_a(factors, other) for other in found):
            found.append(factors)
    return found


def same_lora_a(one: LoRAWeights, other: LoRAWeights) -> bool:
    return one.lora_a is other.lora_a or (
        one.lora_a.shape == other.lora_a.shape and bool(mx.array_equal(one.lora_a, other.lora_a))
    )


def block_lora_b(part: LoRARows, blocks: Sequence[LoRAWeights], scale: float) -> mx.array:
    """Give a part's rows of the joined B: zeros in the columns of other blocks."""
    factors, start, stop = part
    columns = [block.lora_a.shape[0] for block in blocks]
    if factors is None or not factors.lora_a.shape[0]:
        return mx.zeros((stop - start, sum(columns)))
    up = factors.lora_b[start:stop]
    if factors.scale != scale:
        up = up * (factors.scale / scale)
    if len(blocks) == 1:
        return up
    at = next(i for i, block in enumerate(blocks) if same_lora_a(factors, block))
    return mx.pad(up, [(0, 0), (sum(columns[:at]), sum(columns[at + 1 :]))])


def slice_magnitude(part: LoRARows) -> mx.array:
    factors, start, stop = part
    if factors is None:
        return mx.full((stop - start,), mx.nan)
    if factors.magnitude is None:
        raise KeyMapError("DoRA and LoRA stand side by side in one joined weight; merge one first")
    return factors.magnitude[start:stop]
