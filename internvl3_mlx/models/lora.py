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
class Factors:
    """What an adapter does to one weight: ``scale * up @ down`` is added, then rows are stretched.

    down: (r, in), up: (out, r), magnitude: (out,) the rows' lengths, for DoRA alone; a row whose
    magnitude is NaN keeps the length of the weight's own row.
    """

    down: mx.array
    up: mx.array
    scale: float
    magnitude: mx.array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def rows(self, start: int, stop: int) -> "Factors":
        """Take what concerns rows ``start`` to ``stop`` of the weight."""
        magnitude = None if self.magnitude is None else self.magnitude[start:stop]
        return Factors(self.down, self.up[start:stop], self.scale, magnitude)

    def applied(self, weight: mx.array) -> mx.array:
        """Merge into dense rows, in float32. weight: (out, in) -> (out, in) float32."""
        own = weight.astype(mx.float32)
        up, down = self.up.astype(mx.float32), self.down.astype(mx.float32)
        changed = own + self.scale * (up @ down)
        if self.magnitude is None:
            return changed
        wanted = filled(self.magnitude.astype(mx.float32), lengths(own))
        return changed * (wanted / divisors(mx.square(changed).sum(axis=-1)))[:, None]


class LoRALinear(nn.Module):
    """A linear layer with an adapter. Only the adapter is trained.

    The factors are float32 whatever the layer computes in: bfloat16 would swallow small updates.
    The wide product with A runs in x's own type, so that no float32 copy of x is kept for the
    backward pass; everything of width r, and the sum with the layer's result, is float32.
    """

    def __init__(self, base: nn.Module, factors: Factors, dropout: float = 0.0):
        super().__init__()
        self.base = base.freeze()
        self.dropout, self.active = dropout, True
        if factors.magnitude is not None:
            self._squares = mx.square(dense_weight(base)).sum(axis=-1)  # once: W does not change
        self.take(factors)

    def take(self, factors: Factors) -> None:
        """Hold these factors from now on."""
        self.scale = factors.scale
        self.pop("_lengths", None)
        self.lora_A = factors.down.astype(mx.float32)
        self.lora_B = factors.up.astype(mx.float32)
        if factors.magnitude is not None:
            given = factors.magnitude.astype(mx.float32)
            self.lora_magnitude_vector = filled(given, mx.sqrt(self._squares))

    @classmethod
    def fresh(
        cls, base: nn.Module, rank: int, scale: float, dropout: float = 0.0, *, dora: bool = False
    ) -> "LoRALinear":
        """Begin an adapter that changes nothing yet: A uniform within 1/sqrt(in), B zero."""
        out, width = sides(base)
        bound = 1 / math.sqrt(width)
        down = mx.random.uniform(-bound, bound, (rank, width))
        own = mx.full((out,), math.nan) if dora else None
        return cls(base, Factors(down, mx.zeros((out, rank)), scale, own), dropout)

    def __call__(self, x: mx.array) -> mx.array:
        """x: (..., in) -> (..., out)"""
        y = self.base(x)
        if not self.active:
            return y
        drops = self.training and self.dropout > 0
        seen = dropped(x, self.dropout) if drops else x
        down = (seen @ self.lora_A.T.astype(x.dtype)).astype(mx.float32)
        added = (self.scale * down) @ self.lora_B.T
        if "lora_magnitude_vector" not in self:
            return (y + added).astype(y.dtype)
        ratio = self.lora_magnitude_vector / self.divisor()
        own = product(self.base, seen) if drops else without_bias(y, self.base)
        return (y + (ratio - 1) * own + ratio * added).astype(y.dtype)

    def divisor(self) -> mx.array:
        """Give the rows' lengths, constants to every gradient: (out,)."""
        settled: mx.array | None = self.get("_lengths")
        return mx.stop_gradient(self.row_lengths()) if settled is None else settled

    def settle(self, dtype: mx.Dtype) -> None:
        """Work out once what changes no more: for a trained adapter, in a model of ``dtype``.

        Otherwise each token would read the weight twice for DoRA and cast A anew.
        """
        if "lora_magnitude_vector" in self:
            self._lengths = self.row_lengths()
        self.lora_A = self.lora_A.astype(dtype)

    def row_lengths(self) -> mx.array:
        """Measure the rows of W + scale * B A, (out,), without ever making them.

        |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b, and A W^T is a product like others.
        """
        a, b = self.lora_A, self.lora_B
        crossed = product(self.base, a).astype(mx.float32).T
        mixed = 2 * self.scale * crossed + self.scale**2 * (b @ (a @ a.T))
        return divisors(self._squares + (b * mixed).sum(axis=-1))

    @property
    def factors(self) -> Factors:
        return Factors(self.lora_A, self.lora_B, self.scale, self.get("lora_magnitude_vector"))


def sides(linear: nn.Module) -> tuple[int, int]:
    """Give a linear layer's (out, in), dense or packed."""
    if isinstance(linear, nn.QuantizedLinear):
        return linear.scales.shape[0], linear.scales.shape[1] * linear.group_size
    return linear.weight.shape[0], linear.weight.shape[1]


def dense_weight(linear: nn.Module) -> mx.array:
    """Give a linear layer's weight, (out, in) float32, unpacked if it is packed."""
    if not isinstance(linear, nn.QuantizedLinear):
        weight: mx.array = linear.weight
        return weight.astype(mx.float32)
    biases = linear.get("biases")
    return mx.dequantize(
        linear.weight,
        widened(linear.scales),
        None if biases is None else widened(biases),
        group_size=linear.group_size,
        bits=linear.bits,
        mode=linear.mode,
    ).astype(mx.float32)


def widened(x: mx.array) -> mx.array:
    """Make floats float32; the scales of the mx formats are bytes and stay so."""
    return x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x


def product(linear: nn.Module, x: mx.array) -> mx.array:
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


def without_bias(y: mx.array, linear: nn.Module) -> mx.array:
    return y - linear.bias if "bias" in linear else y


def dropped(x: mx.array, rate: float) -> mx.array:
    """Drop a share of the numbers and stretch the others, so that the mean stays."""
    return mx.where(mx.random.bernoulli(1 - rate, x.shape), x * (1 / (1 - rate)), 0)


def adapters(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
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


SHORTEST = 1e-12  # a row's length that is divided by


def lengths(rows: mx.array) -> mx.array:
    """Measure rows: (out, in) -> (out,)."""
    return mx.sqrt(mx.square(rows).sum(axis=-1))


def divisors(squares: mx.array) -> mx.array:
    """Take the root of squared lengths, never zero: a row of zeros is stretched to zeros."""
    return mx.sqrt(mx.maximum(squares, SHORTEST**2))


def filled(magnitude: mx.array, own: mx.array) -> mx.array:
    return mx.where(mx.isnan(magnitude), own, magnitude)


Part = tuple[Factors | None, int, int]  # rows from start to stop of one that is changed, or not


def joined(parts: Sequence[Part]) -> Factors:
    """Join rows of several adapters. One and the same A is kept once, others stand in blocks."""
    whole = [factors for factors, _, _ in parts if factors is not None]
    adding = [factors for factors in whole if factors.down.shape[0]]
    blocks, first = distinct(adding), adding[0]
    scale = first.scale if all(factors.scale == first.scale for factors in adding) else 1.0
    ups = [up_rows(part, blocks, scale) for part in parts]
    down = mx.concatenate([block.down for block in blocks]) if len(blocks) > 1 else first.down
    magnitude = None
    if any(factors.magnitude is not None for factors in whole):
        magnitude = mx.concatenate([magnitude_rows(part) for part in parts])
    return Factors(down, mx.concatenate(ups) if len(ups) > 1 else ups[0], scale, magnitude)


def distinct(whole: Sequence[Factors]) -> list[Factors]:
    """List adapters whose A differ, in order."""
    found: list[Factors] = []
    for factors in whole:
        if not any(same_down(factors, other) for other in found):
            found.append(factors)
    return found


def same_down(one: Factors, other: Factors) -> bool:
    return one.down is other.down or (
        one.down.shape == other.down.shape and bool(mx.array_equal(one.down, other.down))
    )


def up_rows(part: Part, blocks: Sequence[Factors], scale: float) -> mx.array:
    """Give a part's rows of the joined B: zeros in the columns of other blocks."""
    factors, start, stop = part
    columns = [block.down.shape[0] for block in blocks]
    if factors is None or not factors.down.shape[0]:
        return mx.zeros((stop - start, sum(columns)))
    up = factors.up[start:stop]
    if factors.scale != scale:
        up = up * (factors.scale / scale)
    if len(blocks) == 1:
        return up
    at = next(i for i, block in enumerate(blocks) if same_down(factors, block))
    return mx.pad(up, [(0, 0), (sum(columns[:at]), sum(columns[at + 1 :]))])


def magnitude_rows(part: Part) -> mx.array:
    factors, start, stop = part
    if factors is None:
        return mx.full((stop - start,), mx.nan)
    if factors.magnitude is None:
        raise KeyMapError("DoRA and LoRA stand side by side in one joined weight; merge one first")
    return factors.magnitude[start:stop]
