"""Rotary embedding from whole or fractional positions, and the scalings of its frequencies.

V2PE places image tokens at multiples of 1/256. MLX's fused rotary reduces angles in float32 on a
Mac's GPU: at position 32,000 its error is half such a step. Explicit positions are therefore
rotated by tables of cosines and sines, which MLX computes precisely on every device, once for all
layers of a forward pass. Consecutive integers take the fused rotary; their steps are 256 times
longer.
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from internvl3_mlx.config import RopeScaling, TextConfig
from internvl3_mlx.metal_kernels.decode_kernels import padded_positions
from internvl3_mlx.metal_kernels.kv_append import RopeParams
from internvl3_mlx.models.layers import compile_on_gpu

# The first of consecutive integer positions: one for all sequences, or (B,) int32; or one position
# for each token: (L,) or (B, L) float32.
Positions = int | mx.array
STEP = (0, 0)  # in place of numbers of heads


@dataclass(frozen=True)
class Rotary:
    """Rotates queries and keys. ``base``: rope_theta, or scaled frequencies (D/2,).

    ``score_scale``: a factor of the attention scores, to be applied to the queries. YaRN scales
    rotated queries and keys alike; the keys in a cache stay unscaled here.
    """

    head_dim: int
    base: float | mx.array
    positions: Positions
    score_scale: float = 1.0
    tables: tuple[mx.array, mx.array] | None = field(init=False, repr=False)
    by_head: dict[tuple[int, int], tuple[mx.array, ...]] = field(
        init=False, repr=False, default_factory=dict[tuple[int, int], tuple[mx.array, ...]]
    )

    def __post_init__(self) -> None:
        positions, tables = self.positions, None
        if isinstance(positions, mx.array) and positions.dtype != mx.int32:
            tables = self.make_tables(positions)
        object.__setattr__(self, "tables", tables)

    def make_tables(self, positions: mx.array) -> tuple[mx.array, mx.array]:
        """Return cosines and sines: positions (L,) or (B, L) -> (L, 1, D/2) or (B, L, 1, D/2)."""
        if isinstance(self.base, mx.array):
            inverse = 1 / self.base
        else:
            inverse = inverse_frequencies(self.head_dim, self.base)
        angles = positions[..., None, None] * inverse
        return mx.cos(angles), mx.sin(angles)

    def __call__(self, x: mx.array) -> mx.array:
        """Rotate pairs (i, i + D/2), as Qwen2 and Llama do. x: (B, L, H, D) -> (B, H, L, D)."""
        if self.tables is None:
            return self.apply_rope(x.transpose(0, 2, 1, 3), self.positions)
        rotated = rotate_pairs(*mx.split(x, 2, axis=-1), *self.tables)
        return mx.concatenate(list(rotated), axis=-1).transpose(0, 2, 1, 3)

    def rotate_heads(self, x: mx.array, count: int) -> mx.array:
        """Rotate the first ``count`` heads of one token, and pass on the others as they are.

        x: (B, 1, H, D) -> (B, H, 1, D). So one operation takes queries, keys and values together:
        a rotation by 0 changes nothing. Positions: (B,) int32 or (B, 1) float32.
        """
        batch, _, heads, dim = x.shape
        if (heads, count) not in self.by_head:  # made once for all layers
            self.by_head[heads, count] = self.head_rotations(heads, count)
        rotations = self.by_head[heads, count]
        if self.tables is None:
            rotated = self.apply_rope(x.reshape(-1, 1, 1, dim), rotations[0])
        else:
            cos, sin = rotations
            halves = rotate_pairs(*mx.split(x, 2, axis=-1), cos, sin)
            rotated = mx.concatenate(list(halves), axis=-1)
        return rotated.reshape(batch, heads, 1, dim)

    def head_rotations(self, heads: int, count: int) -> tuple[mx.array, ...]:
        """Return an offset for each head, (B * H,) int32; or cosines and sines, (B, 1, H, D/2)."""
        rotates = mx.arange(heads) < count
        if self.tables is None:
            offsets = mx.where(rotates, mx.array(self.positions)[:, None], 0)
            return (offsets.reshape(-1),)
        cos, sin = self.tables
        return mx.where(rotates[:, None], cos, 1.0), mx.where(rotates[:, None], sin, 0.0)

    def rope_params(self, length: int) -> RopeParams:
        """Return the rotation of ``length`` tokens as arrays, for the ``kv_append`` kernel."""
        positions, base = self.positions, self.base
        if isinstance(positions, int):
            positions = mx.array([positions], dtype=mx.int32)
        if positions.dtype == mx.int32:  # of the first token of each sequence
            positions = (positions[:, None] + mx.arange(length)).astype(mx.float32)
        if isinstance(base, mx.array):
            return RopeParams(positions, base)
        return RopeParams.from_base(positions, self.head_dim, base)

    def step_params(self) -> RopeParams | None:
        """Return the rotation of one token of each sequence for the ``head_rotation`` kernel.

        Made once for all layers. None where sequences have frequencies of their own.
        """
        if isinstance(self.base, mx.array) and self.base.ndim > 1:
            return None
        if STEP not in self.by_head:
            rope = self.rope_params(1)
            self.by_head[STEP] = padded_positions(rope.positions), rope.freqs
        return RopeParams(*self.by_head[STEP])

    def apply_rope(self, x: mx.array, offset: int | mx.array) -> mx.array:
        """Rotate x: (B, H, L, D), the first token by ``offset``, (B,) for one of each sequence."""
        base, freqs = (None, self.base) if isinstance(self.base, mx.array) else (self.base, None)
        return mx.fast.rope(
            x, self.head_dim, traditional=False, base=base, scale=1.0, offset=offset, freqs=freqs
        )


@lru_cache(maxsize=64)
def scaled_frequencies(config: TextConfig) -> tuple[float | mx.array, float]:
    """Return the base, or the scaled frequencies (D/2,) float32, and the factor of the scores.

    A frequency here is what a position is divided by, as in mx.fast.rope. Dynamic NTK depends on
    the length and is computed where it applies.
    """
    scaling, base, dim = config.rope_scaling, config.rope_theta, config.head_dim
    scale = SCALINGS.get(scaling.rope_type)
    if scale is None:
        return base, 1.0
    inverse = base ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    scaled = scale(inverse, scaling, base)
    factor = yarn_attention_factor(scaling) if scaling.rope_type == "yarn" else 1.0
    return mx.array((1 / scaled).astype(np.float32)), factor**2


def scale_linear(
    inverse: NDArray[np.float64], scaling: RopeScaling, base: float
) -> NDArray[np.float64]:
    """Divide all positions by one factor (position interpolation, arXiv 2306.15595)."""
    return inverse / (scaling.factor or 1.0)


def scale_yarn(
    inverse: NDArray[np.float64], scaling: RopeScaling, base: float
) -> NDArray[np.float64]:
    """Interpolate slow rotations, keep fast ones, and ramp between (YaRN, arXiv 2309.00071)."""
    dim, trained = 2 * len(inverse), scaling.original_max_position_embeddings or 1

    def dimension(rotations: float) -> float:
        """Return the dimension that rotates so often within the trained window."""
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(scaling.beta_fast or 32), dimension(scaling.beta_slow or 1)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # transformers avoids the singularity so
    kept = 1 - np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    return inverse / (scaling.factor or 1.0) * (1 - kept) + inverse * kept


def scale_llama3(
    inverse: NDArray[np.float64], scaling: RopeScaling, base: float
) -> NDArray[np.float64]:
    """Divide long wavelengths, keep short ones, and blend between, as Llama 3.1 does."""
    trained = scaling.original_max_position_embeddings or 1
    low, high = scaling.low_freq_factor or 1.0, scaling.high_freq_factor or 4.0
    rotations = trained * inverse / (2 * math.pi)  # within the trained window
    kept = np.clip((rotations - low) / (high - low), 0, 1)
    return inverse / (scaling.factor or 1.0) * (1 - kept) + inverse * kept


def yarn_attention_factor(scaling: RopeScaling) -> float:
    """Return the factor of rotated queries and of rotated keys."""

    def temperature(weight: float) -> float:
        factor = scaling.factor or 1.0
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)
    return temperature(1.0)


SCALINGS = {"linear": scale_linear, "yarn": scale_yarn, "llama3": scale_llama3}


@lru_cache(maxsize=64)
def inverse_frequencies(head_dim: int, base: float) -> mx.array:
    """Return base ** (-2i / D) to the last bit as MLX's rotary has it on a CPU: (D/2,) float32."""
    half = head_dim // 2
    exponents = mx.arange(0, -half, -1, dtype=mx.float32) * (math.log(base) / half)
    inverse = mx.exp(exponents, stream=mx.cpu)
    mx.eval(inverse)  # shared by all threads
    return inverse


@compile_on_gpu
def rotate_pairs(
    one: mx.array, other: mx.array, cos: mx.array, sin: mx.array
) -> tuple[mx.array, mx.array]:
    """Rotate pairs in float32: (B, L, H, D/2) each, tables as in ``Rotary``."""
    a, b = one.astype(mx.float32), other.astype(mx.float32)
    return (a * cos - b * sin).astype(one.dtype), (b * cos + a * sin).astype(one.dtype)


def ntk_base(base: float, head_dim: int, factor: float, length: int, trained: int) -> float:
    """Return the base of dynamic NTK scaling for ``length`` tokens, ``trained`` without scaling."""
    if length <= trained:
        return base
    return base * (factor * length / trained - (factor - 1)) ** (head_dim / (head_dim - 2))


def ntk_frequencies(positions: mx.array, head_dim: int, base: float, stretched: float) -> mx.array:
    """Return the frequencies for explicit positions beyond the trained window: (D/2,) float32.

    Consecutive integers take the ``stretched`` base, V2PE's positions the original one. The choice
    is part of the graph, so that nothing waits for the host.
    """
    rows = positions.reshape(-1, positions.shape[-1])
    consecutive = mx.all(rows - rows[:, :1] == mx.arange(rows.shape[1]))
    exponent = mx.arange(0, head_dim, 2, dtype=mx.float32) / head_dim
    return mx.where(consecutive, mx.array(stretched), mx.array(base)) ** exponent
