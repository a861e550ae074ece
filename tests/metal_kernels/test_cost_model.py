"""The emulator counts the bytes that the cost model and docs/metal.md state."""

from pathlib import Path

import mlx.core as mx
import pytest
from fixtures.attention_cases import Ragged
from fixtures.published_sizes import SIZES

import internvl3_mlx
from internvl3_mlx.metal_kernels.cost_model import (
    MATRIX_TOKENS,
    PRODUCT_SLOTS,
    AttentionCost,
    cost_table,
)
from internvl3_mlx.metal_kernels.dispatch import SIMD_WIDTH
from internvl3_mlx.metal_kernels.flash_decode import flash_decode_kernel
from internvl3_mlx.metal_kernels.kv_layout import DENSE_BITS, DenseKV, QuantizedKVRows
from internvl3_mlx.metal_kernels.launch_plan import SplitPlan
from internvl3_mlx.metal_kernels.token_time import DECODERS, GPUS, TokenTime, time_table

METAL = Path(internvl3_mlx.__file__).parents[1] / "docs" / "metal.md"


PLAN = SplitPlan(tokens=64, threadgroups=160, cores=40)


@pytest.mark.parametrize(
    "shape",
    [Ragged((35,), 3, 32, 4), Ragged((520,), 7, 64, 8, 64), Ragged((35,), 3, 32, draft=7)],
    ids=str,
)
def test_the_emulator_counts_the_same_bytes(emulated, shape):
    q, store = shape.made(mx.float16)
    (tokens,) = shape.lengths
    store = fitted(store, tokens)
    look = AttentionCost(
        shape.kv_heads * shape.sharing, shape.kv_heads, shape.dim, tokens, shape.bits, shape.draft,
        shape.group_size, PLAN,
    )  # fmt: skip
    with emulated(schedules=("forward",)) as metal:
        flash_decode_kernel(q, store, tokens, splits=look.splits)
    split, join = metal.dispatches
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
    assert eight.kernel_flops == eight.flops


def test_eight_answers_about_one_image_read_it_once():
    one, eight = (AttentionCost(28, 4, 128, 3328, 8, draft=n) for n in (1, 8))
    assert eight.store_nbytes == one.store_nbytes
    assert eight.flops == 8 * one.flops
    assert AttentionCost(28, 4, 128, 3328).store_nbytes == 2 * 4 * 3328 * 128 * 2
    assert AttentionCost(28, 4, 128, 3328).bits == DENSE_BITS


@pytest.mark.parametrize("bits", [DENSE_BITS, 8, 4])
def test_the_emulator_counts_about_as_many_instructions_as_the_model(emulated, bits):
    """For eight tokens and a lane, beside the matrix products, which are counted by themselves."""
    once, thrice = (
        instructions(emulated, Ragged((tokens,), 7, 128, bits, 64, kv_heads=1))
        for tokens in (128, 384)
    )
    counted = (thrice - once) / (256 / MATRIX_TOKENS) / SIMD_WIDTH
    cost = AttentionCost(7, 1, 128, MATRIX_TOKENS, bits)
    products = 2 * 128 / 8 * PRODUCT_SLOTS
    assert counted == pytest.approx(cost.slots - products, rel=0.2)


def instructions(emulated, shape: Ragged) -> int:
    q, store = shape.made(mx.float16)
    with emulated(schedules=("forward",), counted=True) as metal:
        flash_decode_kernel(q, store, mx.array(shape.lengths), splits=1)
    return sum(metal.dispatches[0].run.arithmetic.values())


def test_the_document_contains_the_tables():
    document = METAL.read_text("utf-8")
    assert cost_table(16384) in document
    assert time_table(4096) in document
    assert time_table(16384) in document


@pytest.mark.parametrize("decoder", DECODERS, ids=lambda decoder: decoder.name)
def test_decoders_have_the_published_shapes(decoder):
    """The weights: what a checkpoint has beside vision model, embedding and projector."""
    name = decoder.name.lower().removeprefix("internvl3 ").replace("internvl3.5 ", "3.5-")
    size = SIZES[name]
    shape = (decoder.layers, decoder.width, decoder.heads, decoder.kv_heads, decoder.head_dim)
    assert shape == (size.layers, size.width, size.heads, size.kv_heads, size.head_dim)
    assert decoder.inner == size.inner * (size.per_token or 1)
    if not size.experts:
        tower = 5.6e9 if size.big_tower else 0.31e9
        rest = size.parameters - tower - size.vocab * size.width
        assert decoder.weights == pytest.approx(rest, rel=0.03)


@pytest.mark.parametrize("decoder", DECODERS, ids=lambda decoder: decoder.name)
def test_the_model_of_time_never_beats_the_limits(decoder):
    for gpu in GPUS:
        for tokens in (1, 3328, 131072):
            dense, packed = (TokenTime(decoder, gpu, tokens, bits) for bits in (DENSE_BITS, 4))
            cost = packed.cost
            least = decoder.layers * cost.store_nbytes / gpu.bytes_per_second
            assert packed.seconds > least + decoder.weights / 2 / gpu.bytes_per_second
            assert packed.in_flight > 0
            assert dense.bounds["memory"] > packed.bounds["memory"]
