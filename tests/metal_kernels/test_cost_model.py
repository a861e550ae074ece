"""The emulator counts the bytes that the cost model and docs/metal.md state."""

from pathlib import Path

import mlx.core as mx
import pytest
from fixtures.attention_cases import Ragged

import internvl3_mlx
from internvl3_mlx.metal_kernels.cost_model import AttentionCost, cost_table
from internvl3_mlx.metal_kernels.flash_decode import flash_decode_kernel
from internvl3_mlx.metal_kernels.kv_layout import DENSE_BITS, DenseKV, QuantizedKVRows

METAL = Path(internvl3_mlx.__file__).parents[1] / "docs" / "metal.md"


@pytest.mark.parametrize(
    "shape",
    [Ragged((35,), 3, 32, 4), Ragged((520,), 7, 64, 8, 64), Ragged((35,), 3, 32, draft=7)],
    ids=str,
)
def test_the_emulator_counts_the_same_bytes(emulated, shape):
    q, store = shape.made(mx.float16)
    (tokens,) = shape.lengths
    store = fitted(store, tokens)
    with emulated(schedules=("forward",)) as metal:
        flash_decode_kernel(q, store, tokens)
    split, join = metal.dispatches
    look = AttentionCost(
        shape.kv_heads * shape.sharing, shape.kv_heads, shape.dim, tokens, shape.bits, shape.draft,
        shape.group_size,
    )  # fmt: skip
    assert sum(split.reads[name].total for name in ("keys", "values")) == look.store_nbytes
    parts = sum(split.writes[name] for name in ("out", "top", "sum"))
    parts += sum(join.reads[name].distinct for name in ("parts", "tops", "sums"))
    assert parts == look.parts_nbytes


def fitted(store: DenseKV | QuantizedKVRows, tokens: int) -> DenseKV | QuantizedKVRows:
    """Copy the first tokens, so that they are the whole store."""
    first = store.first_tokens(tokens)
    if isinstance(first, DenseKV):
        return DenseKV(mx.contiguous(first.keys), mx.contiguous(first.values))
    return QuantizedKVRows(mx.contiguous(first.rows), first.layout)


def test_matrix_tiles_are_counted_with_their_padding():
    seven, eight, nine = (AttentionCost(rows, 1, 64, 100) for rows in (7, 8, 9))
    assert seven.flops * 8 == eight.flops * 7
    assert seven.kernel_flops == eight.kernel_flops
    assert nine.kernel_flops == 2 * eight.kernel_flops
    assert eight.kernel_flops == eight.flops + 2 * 2 * 64 * 100


def test_eight_answers_about_one_image_read_it_once():
    one, eight = (AttentionCost(28, 4, 128, 3328, 8, draft=n) for n in (1, 8))
    assert eight.store_nbytes == one.store_nbytes
    assert eight.flops == 8 * one.flops
    assert AttentionCost(28, 4, 128, 3328).store_nbytes == 2 * 4 * 3328 * 128 * 2
    assert AttentionCost(28, 4, 128, 3328).bits == DENSE_BITS


def test_the_document_contains_the_table():
    assert cost_table(16384) in METAL.read_text("utf-8")
