"""Keys and values as the kernels take them: whole backing arrays, never slices.

A slice would be copied at every token, because a kernel's inputs must lie without gaps.
"""

from dataclasses import dataclass

import mlx.core as mx

from internvl3_mlx.metal_kernels.kv_layout import RowLayout, unpack

WHOLE = 16  # "bits" of numbers that are not packed, whatever their type


@dataclass(frozen=True)
class Dense:
    """Keys and values as they are: (B, KV, C, D) each, the whole backing arrays."""

    keys: mx.array
    values: mx.array

    bits = WHOLE

    @property
    def dtype(self) -> mx.Dtype:
        return self.keys.dtype

    @property
    def group_size(self) -> int:
        return self.keys.shape[-1]

    def numbers(self) -> tuple[mx.array, mx.array]:
        return self.keys, self.values

    def first(self, length: int) -> "Dense":
        return Dense(self.keys[..., :length, :], self.values[..., :length, :])

    @property
    def arrays(self) -> tuple[mx.array, mx.array]:
        return self.keys, self.values


@dataclass(frozen=True)
class PackedRows:
    """Packed rows: (B, KV, C, W) uint32, the whole backing array."""

    rows: mx.array
    layout: RowLayout

    @property
    def dtype(self) -> mx.Dtype:
        return self.layout.dtype

    @property
    def bits(self) -> int:
        return self.layout.bits

    @property
    def group_size(self) -> int:
        return self.layout.group_size

    def numbers(self) -> tuple[mx.array, mx.array]:
        return unpack(self.rows, self.layout)

    def first(self, length: int) -> "PackedRows":
        return PackedRows(self.rows[..., :length, :], self.layout)

    @property
    def arrays(self) -> tuple[mx.array, mx.array]:
        return self.rows, self.rows


Store = Dense | PackedRows
