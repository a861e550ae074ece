"""Rotary embedding from whole or fractional positions, and dynamic NTK.

V2PE places image tokens at multiples of 1/256. MLX's fused rotary takes integer offsets and a
scale, so a position p is passed as the offset 256*p with scale 1/256, one offset for each token:
fractional positions need no kernel of our own.
"""

from dataclasses import dataclass

import mlx.core as mx

from internvl3_mlx.metal_kernels.kv_append import RopeParams

POSITIONS_PER_UNIT = 256  # the finest V2PE step is 1/256 (paper section 2.2)

# the first of consecutive integer positions, or one position for each token: (L,) or (B, L) float32
Positions = int | mx.array


@dataclass(frozen=True)
class Rotary:
    """Rotates queries and keys. ``base``: rope_theta, or frequencies (D/2,) under dynamic NTK."""

    head_dim: int
    base: float | mx.array
    positions: Positions

    def __call__(self, x: mx.array) -> mx.array:
        """Rotate pairs (i, i + D/2), as Qwen2 and Llama do. x: (B, L, H, D) -> (B, H, L, D)."""
        if isinstance(self.positions, int):
            return self.apply_rope(x.transpose(0, 2, 1, 3), self.positions, 1.0)
        batch, length, heads, dim = x.shape
        offsets = mx.broadcast_to(self.positions * POSITIONS_PER_UNIT, (batch, length)).astype(
            mx.int32
        )
        rows = x.reshape(batch * length, heads, 1, dim)
        rotated = self.apply_rope(rows, offsets.reshape(-1), 1 / POSITIONS_PER_UNIT)
        return rotated.reshape(batch, length, heads, dim).transpose(0, 2, 1, 3)

    def rope_params(self, length: int) -> RopeParams:
        """Return the same rotation as arrays, for the ``kv_append`` kernel."""
        start, base = self.positions, self.base
        if isinstance(start, int):
            positions = mx.array([start + i for i in range(length)], dtype=mx.float32)
        else:
            positions = start
        if isinstance(base, mx.array):
            return RopeParams(positions, base)
        return RopeParams.from_base(positions, self.head_dim, base)

    def apply_rope(self, x: mx.array, offset: int | mx.array, scale: float) -> mx.array:
        """Rotate x: (B, H, L, D) from ``offset`` on, one integer or one for each of B."""
        base, freqs = (None, self.base) if isinstance(self.base, mx.array) else (self.base, None)
        return mx.fast.rope(
            x, self.head_dim, traditional=False, base=base, scale=scale, offset=offset, freqs=freqs
        )


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
