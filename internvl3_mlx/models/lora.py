"""Low-rank adapters of linear layers, dense or quantized: LoRA, rsLoRA and DoRA.

The layer's weight W stays frozen; two low-rank matrices A (r, in) and B (out, r) add scale * B A to
it. DoRA then gives each row of the sum a trained norm, its magnitude. Sources: arXiv 2106.09685,
2312.03732 and 2402.09353; initialization, dropout, scaling and parameter names are PEFT's.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from internvl3_mlx.distributed.shard import WHOLE, Shard
from internvl3_mlx.errors import KeyMapError


@dataclass(frozen=True, eq=False)
class LoRAWeights:
    """An adapter of one weight: ``scale * lora_b @ lora_a`` is added, then rows are rescaled.

    lora_a: (r, in), lora_b: (out, r), magnitude: (out,) the norms of the rows, for DoRA alone; NaN
    stands for the norm of the weight's own row.
    """

    lora_a: mx.array
    lora_b: mx.array
    scale: float
    magnitude: mx.array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.lora_b.shape[0], self.lora_a.shape[1]

    def slice_rows(self, start: int, stop: int) -> "LoRAWeights":
        """Return the part for rows ``start`` to ``stop`` of the weight."""
        magnitude = None if self.magnitude is None else self.magnitude[start:stop]
        return LoRAWeights(self.lora_a, self.lora_b[start:stop], self.scale, magnitude)

    def merged_into(self, weight: mx.array) -> mx.array:
        """Return the merged weight. weight: (out, in) dense -> (out, in) float32."""
        own = weight.astype(mx.float32)
        lora_a, lora_b = self.lora_a.astype(mx.float32), self.lora_b.astype(mx.float32)
        merged = own + self.scale * (lora_b @ lora_a)
        if self.magnitude is None:
            return merged
        norms = fill_nan(self.magnitude.astype(mx.float32), row_norms(own))
        return merged * (norms / norms_from_squares(mx.square(merged).sum(axis=-1)))[:, None]


class LoRALinear(nn.Module):
    """A linear layer with an adapter. Only the adapter is trained.

    A and B are float32 whatever the layer computes in: bfloat16 would lose small updates. The
    product with A runs in the dtype of x, so that no float32 copy of x is kept for the backward
    pass; everything of width r, and the sum with the layer's output, is float32.

    columns: the ranks that the columns of the weight, and of A, are divided among. Each computes
    its part of the output, and whoever calls the layer adds them.
    """

    def __init__(
        self, base: nn.Module, weights: LoRAWeights, dropout: float = 0.0, columns: Shard = WHOLE
    ):
        super().__init__()
        self.base = base.freeze()
        self.dropout, self.enabled, self.columns = dropout, True, columns
        if weights.magnitude is not None:  # computed once, since W does not change
            self._squares = columns.sum(mx.square(dequantized_weight(base)).sum(axis=-1))
            columns.meet(self._squares)
        self.load(weights)

    def load(self, weights: LoRAWeights) -> None:
        """Replace A, B and the magnitudes."""
        self.scale = weights.scale
        self.pop("_row_norms", None)
        self.lora_A = weights.lora_a.astype(mx.float32)
        self.lora_B = weights.lora_b.astype(mx.float32)
        if weights.magnitude is not None:
            magnitude = weights.magnitude.astype(mx.float32)
            self.lora_magnitude_vector = fill_nan(magnitude, mx.sqrt(self._squares))

    @classmethod
    def from_base(
        cls,
        base: nn.Module,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        *,
        dora: bool = False,
        columns: Shard = WHOLE,
    ) -> "LoRALinear":
        """Add a new adapter that changes nothing yet: A uniform within 1/sqrt(in), B zero.

        All ranks of ``columns`` draw the same A and keep their columns of it.
        """
        out, width = linear_shape(base)
        whole = width * columns.size
        bound = 1 / math.sqrt(whole)
        lora_a = mx.random.uniform(-bound, bound, (rank, whole))
        lora_a = lora_a[:, columns.rank * width : (columns.rank + 1) * width]
        magnitude = mx.full((out,), math.nan) if dora else None
        weights = LoRAWeights(lora_a, mx.zeros((out, rank)), scale, magnitude)
        return cls(base, weights, dropout, columns)

    def __call__(self, x: mx.array) -> mx.array:
        """x: (..., in) -> (..., out)"""
        y = self.base(x)
        if not self.enabled:
            return y
        has_dropout = self.training and self.dropout > 0
        dropped = dropout(x, self.dropout, self.columns) if has_dropout else x
        low_rank = (dropped @ self.lora_A.T.astype(x.dtype)).astype(mx.float32)
        added = (self.scale * low_rank) @ self.lora_B.T
        if "lora_magnitude_vector" not in self:
            return (y + added).astype(y.dtype)
        ratio = self.lora_magnitude_vector / self.frozen_row_norms()
        own = matmul_weight(self.base, dropped) if has_dropout else subtract_bias(y, self.base)
        return (y + (ratio - 1) * own + ratio * added).astype(y.dtype)

    def frozen_row_norms(self) -> mx.array:
        """Return the norms of the rows, constant for gradients: (out,)."""
        final: mx.array | None = self.get("_row_norms")
        return mx.stop_gradient(self.adapted_row_norms()) if final is None else final

    def finalize(self, dtype: mx.Dtype) -> None:
        """Prepare a trained adapter for inference in a model of ``dtype``.

        Otherwise each token would read the weight twice for DoRA, and cast A again.
        """
        if "lora_magnitude_vector" in self:
            self._row_norms = self.adapted_row_norms()
            self.columns.meet(self._row_norms)
        self.lora_A = self.lora_A.astype(dtype)

    def adapted_row_norms(self) -> mx.array:
        """Return the norms of the rows of W + scale * B A, (out,), without computing the sum.

        |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b, where A W^T is one more product. Of
        divided columns the ranks sum both products.
        """
        a, b = self.lora_A, self.lora_B
        products = [matmul_weight(self.base, a).astype(mx.float32), (a @ a.T).astype(mx.float32)]
        crossed, gram = mx.split(
            self.columns.sum(mx.concatenate(products, axis=1)), [b.shape[0]], 1
        )
        mixed = 2 * self.scale * crossed.T + self.scale**2 * (b @ gram)
        return norms_from_squares(self._squares + (b * mixed).sum(axis=-1))

    @property
    def weights(self) -> LoRAWeights:
        """The adapter as it is now."""
        return LoRAWeights(self.lora_A, self.lora_B, self.scale, self.get("lora_magnitude_vector"))


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """Return (out, in) of a linear layer, dense or quantized."""
    if isinstance(linear, nn.QuantizedLinear):
        return linear.scales.shape[0], linear.scales.shape[1] * linear.group_size
    return linear.weight.shape[0], linear.weight.shape[1]


def dequantized_weight(linear: nn.Module) -> mx.array:
    """Return the weight of a linear layer, dequantized: (out, in) float32."""
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
    """Cast floats to float32; the scales of the mx formats are bytes and stay bytes."""
    return x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x


def matmul_weight(linear: nn.Module, x: mx.array) -> mx.array:
    """Multiply by the weight of a layer, without its bias: (..., in) -> (..., out)."""
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
    """Return the output of a layer without its bias."""
    return y - linear.bias if "bias" in linear else y


def dropout(x: mx.array, rate: float, columns: Shard = WHOLE) -> mx.array:
    """Zero a share of the elements and scale up the others, so that the mean stays.

    x: (..., width), of ``columns.size`` times as many in all. Every rank draws the mask of all of
    them and takes its own, so that the result does not depend on the number of ranks.
    """
    *outer, width = x.shape
    whole = mx.random.bernoulli(1 - rate, (*outer, width * columns.size))
    kept = whole[..., columns.rank * width : (columns.rank + 1) * width]
    return mx.where(kept, x * (1 / (1 - rate)), 0)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Yield the path and the layer of every adapter of a model."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield path, module


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` at a dotted ``path``; numbers are list indices."""
    *steps, last = path.split(".")
    parent: nn.Module | list[nn.Module] = model
    for step in steps:
        parent = parent[int(step)] if isinstance(parent, list) else parent[step]
    if isinstance(parent, list):
        parent[int(last)] = module
    else:
        parent[last] = module


MIN_NORM = 1e-12  # of a row that is divided by its norm


def row_norms(rows: mx.array) -> mx.array:
    """Return the norms of rows: (out, in) -> (out,)."""
    return mx.sqrt(mx.square(rows).sum(axis=-1))


def norms_from_squares(squares: mx.array) -> mx.array:
    """Return the roots of squared norms, never zero, so that a row of zeros stays zero."""
    return mx.sqrt(mx.maximum(squares, MIN_NORM**2))


def fill_nan(magnitude: mx.array, own: mx.array) -> mx.array:
    """Replace NaN by the norm of the weight's own row."""
    return mx.where(mx.isnan(magnitude), own, magnitude)


# an adapter and the rows of it to take, start to stop; None for rows without an adapter
LoRARows = tuple[LoRAWeights | None, int, int]


def concatenate_lora(parts: Sequence[LoRARows]) -> LoRAWeights:
    """Concatenate rows of several adapters into one adapter.

    Those with the same A share it. Those with different A become blocks: the ranks add up, and B is
    zero outside its block. Raises KeyMapError where DoRA and LoRA are mixed.
    """
    adapters = [weights for weights, _, _ in parts if weights is not None]
    nonempty = [weights for weights in adapters if weights.lora_a.shape[0]]
    blocks, first = unique_by_lora_a(nonempty), nonempty[0]
    scale = first.scale if all(weights.scale == first.scale for weights in nonempty) else 1.0
    rows_b = [block_lora_b(part, blocks, scale) for part in parts]
    lora_a = mx.concatenate([block.lora_a for block in blocks]) if len(blocks) > 1 else first.lora_a
    lora_b = mx.concatenate(rows_b) if len(rows_b) > 1 else rows_b[0]
    magnitude = None
    if any(weights.magnitude is not None for weights in adapters):
        magnitude = mx.concatenate([slice_magnitude(part) for part in parts])
    return LoRAWeights(lora_a, lora_b, scale, magnitude)


def unique_by_lora_a(adapters: Sequence[LoRAWeights]) -> list[LoRAWeights]:
    """Return the adapters whose A differ, in order."""
    unique: list[LoRAWeights] = []
    for weights in adapters:
        if not any(same_lora_a(weights, other) for other in unique):
            unique.append(weights)
    return unique


def same_lora_a(one: LoRAWeights, other: LoRAWeights) -> bool:
    return one.lora_a is other.lora_a or (
        one.lora_a.shape == other.lora_a.shape and bool(mx.array_equal(one.lora_a, other.lora_a))
    )


def block_lora_b(part: LoRARows, blocks: Sequence[LoRAWeights], scale: float) -> mx.array:
    """Return the rows of the concatenated B: zero in the columns of other blocks."""
    weights, start, stop = part
    ranks = [block.lora_a.shape[0] for block in blocks]
    if weights is None or not weights.lora_a.shape[0]:
        return mx.zeros((stop - start, sum(ranks)))
    lora_b = weights.lora_b[start:stop]
    if weights.scale != scale:
        lora_b = lora_b * (weights.scale / scale)
    if len(blocks) == 1:
        return lora_b
    index = next(i for i, block in enumerate(blocks) if same_lora_a(weights, block))
    return mx.pad(lora_b, [(0, 0), (sum(ranks[:index]), sum(ranks[index + 1 :]))])


def slice_magnitude(part: LoRARows) -> mx.array:
    """Return the magnitudes of the rows, NaN without an adapter."""
    weights, start, stop = part
    if weights is None:
        return mx.full((stop - start,), mx.nan)
    if weights.magnitude is None:
        raise KeyMapError(
            "DoRA and LoRA adapters cannot share one fused weight; merge one of them first"
        )
    return weights.magnitude[start:stop]
