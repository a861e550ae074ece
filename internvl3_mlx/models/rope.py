"""Rotary embedding from whole or fractional positions, and dynamic NTK.

V2PE places image tokens at multiples of 1/256. MLX's fused rotary takes integer offsets and a
scale, so a position p
goes in as the offset 256*p with scale 1/256, one offset a token: fractional positions cost no
kernel of our own.
"""

from dataclasses import dataclass

import mlx.core as mx

from internvl3_mlx.metal_kernels.kv_append import RopeParams

POSITIONS_PER_UNIT = 256  # the finest V2PE step is 1/256 (paper section 2.2)

Positions = (
    int | mx.array
)  # where a run of whole steps starts, or one position a token: (L,) or (B, L) float32


@dataclass(frozen=True)
class Rotary:
    """Rotates queries and keys. ``base``: rope_theta, or its powers where dynamic NTK may apply."""

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
        turned = self.apply_rope(rows, offsets.reshape(-1), 1 / POSITIONS_PER_UNIT)
        return turned.reshape(batch, length, heads, dim).transpose(0, 2, 1, 3)

    def rope_params(self, length: int) -> RopeParams:
        """Say the same in numbers, for the kernel that turns new keys as it packs them."""
        start, base = self.positions, self.base
        positions = (
            mx.array([start + at for at in range(length)], dtype=mx.float32)
            if isinstance(start, int)
            else start
        )
        if isinstance(base, mx.array):
            return RopeParams(positions, base)
        return RopeParams.from_base(positions, self.head_dim, base)

    def apply_rope(self, x: mx.array, offset: int | mx.array, scale: float) -> mx.array:
        base, freqs = (None, self.base) if isinstance(self.base, mx.array) else (self.base, None)
        return mx.fast.rope(
            x, self.head_dim, traditional=False, base=base, scale=scale, offset=offset, freqs=freqs
        )


def ntk_base(base: float, head_dim: int, factor: float, length: int, trained: int) -> float:
    """Stretch the base so that ``length`` tokens turn like ``trained`` ones, if they are more."""
    if length <= trained:
        return base
    return base * (factor * length / trained - (factor - 1)) ** (head_dim / (head_dim - 2))


def ntk_frequencies(positions: mx.array, head_dim: int, base: float, stretched: float) -> mx.array:
    """Give the rotary's frequencies for explicit positions longer than the trained window: (D/2,)
    float32.

    Ordinary positions are stretched, V2PE's are not. Chosen inside the graph, so that nothing
    waits for the host.
    """
    rows = positions.reshape(-1, positions.shape[-1])
    ordinary = mx.all(rows - rows[:, :1] == mx.arange(rows.shape[1]))
    exponent = mx.arange(0, head_dim, 2, dtype=mx.float32) / head_dim
    return mx.where(ordinary, mx.array(stretched), mx.array(base)) ** exponent
