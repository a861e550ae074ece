"""Attention to two segments, merged, equals attention to both at once."""

import mlx.core as mx
import numpy as np
from fixtures.attention_cases import ROUNDING, Ragged, relative_error

from internvl3_mlx.metal_kernels.flash_decode import (
    attend_mlx,
    batch_to_queries,
    merge_attention,
    queries_to_batch,
)
from internvl3_mlx.metal_kernels.flash_reference import flash_decode_reference
from internvl3_mlx.metal_kernels.kv_layout import DenseKV


def test_a_shared_prefix_and_suffixes_merge_to_the_whole():
    """Five candidates, two key-value heads of three, 11 shared tokens and 1, 4, 2, 4, 3 of each."""
    lengths = (12, 15, 13, 15, 14)
    shape = Ragged(lengths, 3, 64)
    q, store = shape.made()
    whole = DenseKV(*(mx.nan_to_num(part) for part in store.arrays))
    shared = [mx.broadcast_to(part[:1, :, :11], (5, 2, 11, 64)) for part in whole.arrays]
    joined = [
        mx.concatenate([one, part[:, :, 11:]], axis=2)
        for one, part in zip(shared, whole.arrays, strict=True)
    ]
    prefix = DenseKV(*(part[:1, :, :11] for part in whole.arrays))
    suffix = DenseKV(*(part[:, :, 11:] for part in whole.arrays))
    first = [
        queries_to_batch(part) for part in flash_decode_reference(batch_to_queries(q), prefix, 11)
    ]
    second = flash_decode_reference(q, suffix, mx.array(lengths) - 11)
    out, lse = merge_attention(*first, *second)
    expected, sums = shape.exact(q, DenseKV(*joined))
    assert relative_error(out, expected) <= ROUNDING[mx.float32]
    np.testing.assert_allclose(np.array(lse), sums, rtol=1e-5)


def test_an_empty_segment_changes_nothing():
    q, store = Ragged((0, 7), 3, 64).made()
    store = DenseKV(*(mx.nan_to_num(part) for part in store.arrays))
    empty, full = flash_decode_reference(q, store, 0), flash_decode_reference(q, store, 7)
    for pair in ((empty, full), (full, empty)):
        out, lse = merge_attention(*pair[0], *pair[1])
        assert mx.array_equal(out, full[0])
        assert mx.array_equal(lse, full[1])
    nothing = merge_attention(*empty, *empty)[0]
    assert mx.array_equal(nothing, mx.zeros_like(q))


def test_a_draft_is_causal_among_its_own_tokens():
    """The plain operations and MLX's own attention agree on who sees whom."""
    q, store = Ragged((9, 9), 3, 64, draft=4).made()
    store = DenseKV(*(mx.nan_to_num(part) for part in store.arrays))
    out, _ = flash_decode_reference(q, store, 9, causal=True)
    assert mx.allclose(out, attend_mlx(q, store, 9, causal=True), atol=1e-5)
    assert not mx.allclose(out, attend_mlx(q, store, 9), atol=1e-2)
