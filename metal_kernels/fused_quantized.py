"""MLX's own fused attention to a quantized cache, where the installed version has one.

No released version up to 0.32.4 does. Functions in the table are called as public proposals for MLX
define them. Like a kernel of ours, such a function is compared with our reference before its first
use, and used where it was measured to be faster than two quantized products.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx

from internvl3_mlx.metal_kernels import dispatch, registry, self_test
from internvl3_mlx.metal_kernels.flash_decode import FlashVariant, flash_variant
from internvl3_mlx.metal_kernels.flash_reference import flash_decode_reference
from internvl3_mlx.metal_kernels.kv_layout import QuantizedKV, QuantizedKVRows, split_rows
from internvl3_mlx.metal_kernels.self_test_inputs import attention_inputs

SELF_TEST_LENGTHS = ((1537,), (200, 200, 200))  # all sequences of a call have the same
# MLX may round more than we do: its two products are off by some ten times our tolerance
FORGIVEN = 8

Function = Callable[..., Any]  # of mx.fast


def call_with_parts(
    function: Function, q: mx.array, store: QuantizedKV, mask: mx.array | None
) -> mx.array:
    """Pass weights, scales and biases of the keys, then of the values; ``mask``: (L, N) or None."""
    out: mx.array = function(
        q, *store.keys, *store.values, scale=q.shape[-1] ** -0.5, mask=mask,
        group_size=store.group_size, bits=store.bits,
    )  # fmt: skip
    return out


# by name in mx.fast, and how each is called; the first that exists is used
ADAPTERS = {"quantized_scaled_dot_product_attention": call_with_parts}


def function_name() -> str | None:
    """Return the name of MLX's function; None if this version has none."""
    return next((name for name in ADAPTERS if hasattr(mx.fast, name)), None)


def fused_attention(q: mx.array, store: QuantizedKV) -> mx.array:
    """Attend causally by MLX's function, which must exist: (B, H, L, D) -> (B, H, L, D).

    The L rows are the last of the N tokens of the store.
    """
    name = function_name()
    assert name is not None
    length, stored = q.shape[2], store.keys[0].shape[2]
    mask = None
    if length > 1:
        mask = mx.arange(stored - length, stored)[:, None] >= mx.arange(stored)
    return ADAPTERS[name](getattr(mx.fast, name), q, store, mask)


def prefers_fused(q: mx.array, store: QuantizedKV) -> bool:
    """Return whether MLX's function exists, was measured to be faster, and passed its self-test."""
    if function_name() is None or not registry.faster_cases():
        return False
    _, heads, length, dim = q.shape
    kv_heads, stored = store.keys[0].shape[1:3]
    case = flash_variant(
        store.keys[1].dtype, store.bits, dim, store.group_size, heads // kv_heads, length,
        length > 1, kv_heads,
    )  # fmt: skip
    variant = fused_variant(case)
    return (
        variant is not None
        and dispatch.kernel_mode() != dispatch.OFF
        and registry.is_faster(variant.registry_key, stored)
        and self_test.is_usable(variant)
    )


def fused_variant(case: FlashVariant) -> "FusedVariant | None":
    """Return MLX's function for a case of ours; None without one, or for a dense cache."""
    name = function_name()
    if name is None or case.row_layout is None:
        return None
    return FusedVariant(name, case)


@dataclass(frozen=True)
class FusedVariant:
    """MLX's function ``function`` in place of our kernel in ``case``."""

    function: str
    case: FlashVariant

    fallback = "two quantized products"

    @property
    def dtype(self) -> mx.Dtype:
        return self.case.dtype

    @cached_property
    def name(self) -> str:
        return f"mx.fast.{self.function} in place of {self.case.use}"

    @cached_property
    def registry_key(self) -> str:
        """The key of how many times faster than two quantized products it was."""
        return f"mx.fast.{self.function} in place of {self.case.registry_key}"

    def self_test_pairs(self) -> Iterator[tuple[mx.array, mx.array]]:
        """Run the function, and our reference in float32 on the CPU.

        Scores do not rise, which would magnify their rounding.
        """
        for lengths in SELF_TEST_LENGTHS:
            given, stored = attention_inputs(lengths, self.case, rise=0), lengths[0]
            assert isinstance(given.store, QuantizedKVRows)
            rows = mx.contiguous(given.store.first_tokens(stored).rows)
            keys, values = split_rows(rows, given.store.layout)
            store = QuantizedKV(keys, values, self.case.bits, self.case.group_size)
            with mx.stream(mx.cpu):
                expected, _ = flash_decode_reference(
                    given.q.astype(mx.float32), given.dense, stored, causal=self.case.causal
                )
            away = fused_attention(given.q, store).astype(mx.float32) - expected
            yield expected + away / FORGIVEN, expected
