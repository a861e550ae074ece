"""Flash decode in the emulator, with every access watched, against float64."""

from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from fixtures.attention_cases import ROUNDING, Ragged, float64, relative_error

from internvl3_mlx.metal_kernels.flash_decode import flash_decode_kernel
from internvl3_mlx.metal_kernels.flash_reference import LOWEST, flash_decode_reference

# few rows: one simdgroup holds them beside each other
ROWS = [
    *(Ragged(lengths, 3, 32, 4) for lengths in [(1, 7), (8, 9), (0, 33), (1023, 40)]),
    *(Ragged(lengths, 3, 128, 8, 64, kv_heads=3) for lengths in [(9, 1), (31, 64)]),
    *(Ragged(lengths, 1, 64, draft=3, causal=True) for lengths in [(3, 8), (130, 7), (2, 9)]),
    Ragged((1, 8, 9, 7, 66, 5, 2, 40, 33), 3, 32, 4),
    Ragged((4097, 1023), 3, 32, 4),
]
# up to eight rows: one matrix tile, a simdgroup to each stretch of tokens
TILE = [
    *(Ragged(lengths, 7, 64, 8, 64) for lengths in [(1, 7), (8, 9), (0, 130), (1023, 33)]),
    *(Ragged(lengths, 6, 128, 4, 32, kv_heads=3) for lengths in [(9, 1), (31, 64)]),
    *(Ragged(lengths, 2, 32, draft=4, causal=True) for lengths in [(4, 8), (131, 7), (3, 9)]),
    Ragged((1, 8, 9, 7, 66, 5, 2, 40, 33), 7, 64, 8, 64),
    Ragged((4097, 1023), 7, 64, 8, 64),
]
# more rows: a tile to each simdgroup, tokens brought in for all of them
TILES = [
    *(Ragged(lengths, 5, 64, 4, 64, draft=3, causal=True) for lengths in [(3, 7), (8, 9), (2, 65)]),
    *(Ragged(lengths, 16, 128, 8, 64, kv_heads=3) for lengths in [(9, 1), (7, 33)]),
    *(Ragged(lengths, 3, 32, draft=7) for lengths in [(1, 7), (130, 31), (0, 40), (8, 35)]),
    Ragged((1023, 4097), 5, 64, 4, 64, draft=3, causal=True),
]
TYPES = (mx.float32, mx.float16, mx.bfloat16)
MAX_TOUCHES = 1.5  # of a line of the GPU's cache: once for each load of a simdgroup that needs it
CASES = [
    *product([*ROWS, *TILE, *TILES], TYPES),
    (Ragged((33, 5), 7, 128, 8, 64, draft=8), mx.float16),  # eight candidates: seven tiles
    (Ragged((8, 35), 16, 128), mx.float32),  # the widest rows: blocks of half the tokens
    (Ragged((67,), 7, 128, 8, 64), mx.float16),
    (Ragged((67,), 7, 128), mx.float16),
    (Ragged((67,), 7, 64), mx.bfloat16),
    (Ragged((67,), 7, 32, 8, 32), mx.float16),
    (Ragged((67,), 2, 128, 4, 64), mx.float16),
]


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_the_kernel_agrees_with_float64_and_reads_each_byte_and_line_once(emulated, shape, dtype):
    q, store = shape.made(dtype)
    with emulated() as metal:
        out, lse = flash_decode_kernel(
            q, store, mx.array(shape.lengths, mx.int32), causal=shape.causal
        )
    expected, sums = shape.exact(q, store)
    assert out.dtype == dtype
    assert relative_error(out, expected) <= ROUNDING[dtype]
    seen = sums > LOWEST
    assert np.array_equal(np.array(lse) > LOWEST, seen)
    np.testing.assert_allclose(np.array(lse)[seen], sums[seen], atol=1e-5)
    read = [metal.dispatches[0].reads[name] for name in ("keys", "values")]
    assert sum(part.total for part in read) == shape.fewest_bytes(store)
    lines = sum(part.lines for part in read)
    assert 0 < lines <= sum(part.lines_touched for part in read) <= MAX_TOUCHES * lines
    assert metal.dispatches[0].copied == ()


def test_one_length_applies_to_all_sequences(emulated):
    shape = Ragged((9, 9), 3, 32, 4)
    q, store = shape.made()
    with emulated(schedules=("forward",)):
        out, _ = flash_decode_kernel(q, store, 9)
    assert relative_error(out, shape.exact(q, store)[0]) <= ROUNDING[mx.float32]


def test_the_output_has_the_dtype_of_the_queries(emulated):
    shape = Ragged((9, 9), 3, 32, 4)
    q, store = shape.made(mx.float16)
    with emulated(schedules=("forward",)):
        out, _ = flash_decode_kernel(q.astype(mx.float32), store, 9)
    assert out.dtype == mx.float32
    assert relative_error(out, shape.exact(q, store)[0]) <= ROUNDING[mx.float16]


def test_one_dominant_token_is_weighted_exactly(emulated):
    """The maximum rises and falls by hundreds from block to block, and nothing overflows."""
    shape = Ragged((300, 150), 7, 64, loud=100)
    q, store = shape.made()
    with emulated(schedules=("forward",)):
        out, _ = flash_decode_kernel(q, store, mx.array(shape.lengths))
    assert relative_error(out, shape.exact(q, store)[0]) <= 1e-4  # of scores near 300


@pytest.mark.parametrize("shape", [ROWS[4], TILE[2], TILES[2], TILES[7]], ids=str)
def test_the_reference_agrees_with_float64(shape):
    q, store = shape.made()
    clean = type(store).first_tokens(store, max(shape.lengths))
    out, lse = flash_decode_reference(
        q, clean, mx.array(shape.lengths, mx.int32), causal=shape.causal
    )
    expected, sums = shape.exact(q, store)
    assert relative_error(out, expected) <= ROUNDING[mx.float32]
    np.testing.assert_allclose(float64(lse), sums, rtol=1e-5)
