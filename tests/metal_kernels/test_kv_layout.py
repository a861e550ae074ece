"""Quantized rows hold what mx.quantize gives, and nothing else."""

from itertools import product
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from internvl3_mlx.config import TextConfig
from internvl3_mlx.errors import UserError
from internvl3_mlx.generation.context_budget import kv_nbytes_per_token
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.metal_kernels.kv_layout import (
    DENSE_BITS,
    KVRowLayout,
    dequantize_rows,
    join_rows,
    quantize_rows,
    split_rows,
    token_nbytes,
)
from internvl3_mlx.profiling.kernels import AttentionTrial

LAYOUTS = [
    KVRowLayout(dim, bits, group, dtype)
    for (dim, group), bits, dtype in product(
        ((32, 32), (64, 64), (128, 32)), (4, 8), (mx.float16, mx.bfloat16, mx.float32)
    )
]


@pytest.mark.parametrize(
    ("dim", "bits", "each"), [(64, 8, 9), (64, 4, 5), (128, 8, 8.5), (128, 4, 4.5), (96, 16, 16)]
)
def test_a_number_takes_so_many_bits(dim, bits, each):
    """Of heads of 64 rows are padded; the context budget and ``bench`` count them so, too."""
    token = token_nbytes(dim, bits, min(dim, 64), mx.bfloat16)
    assert token * 8 == 2 * dim * each
    assert AttentionTrial("odd", 6, 3, dim, bits).nbytes(7, mx.bfloat16) == 3 * 7 * token
    text = TextConfig(
        family="qwen2", hidden_size=384, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, head_dim=dim, intermediate_size=128, vocab_size=99,
    )  # fmt: skip
    norm = SimpleNamespace(weight=mx.zeros(1, mx.bfloat16))
    model = SimpleNamespace(
        config=SimpleNamespace(text=text),
        language_model=SimpleNamespace(model=SimpleNamespace(norm=norm)),
    )
    config = GenerationConfig(kv_bits=None if bits == DENSE_BITS else bits)
    assert kv_nbytes_per_token(model, config) == 2 * 3 * token


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rows_return_the_numbers_of_mlx_to_the_bit(layout):
    rng = np.random.default_rng(0)
    keys, values = (
        mx.array(rng.normal(size=(2, 3, 5, layout.head_dim))).astype(layout.dtype) for _ in "kv"
    )
    rows = quantize_rows(keys, values, layout)
    assert not rows[..., layout.used_words :].any()
    assert rows.shape == (2, 3, 5, layout.words)
    assert rows.nbytes == 2 * 3 * 5 * layout.row_bytes
    how = {"group_size": layout.group_size, "bits": layout.bits}
    for given, held, back in zip(
        (keys, values), split_rows(rows, layout), dequantize_rows(rows, layout), strict=True
    ):
        packed = mx.quantize(given, **how)
        assert all(mx.array_equal(one, other) for one, other in zip(held, packed, strict=True))
        assert mx.array_equal(back, mx.dequantize(*packed, **how))
        assert back.dtype == layout.dtype
    assert mx.array_equal(join_rows(*split_rows(rows, layout), layout), rows)


def test_a_row_takes_little_more_than_its_bits():
    """Of 128 numbers twice: 8 bits each, and a word for each group of 64; whole units of 16."""
    assert KVRowLayout(128, 8, 64, mx.bfloat16).row_bytes == 256 + 4 * 4
    assert KVRowLayout(128, 4, 64, mx.bfloat16).row_bytes == 128 + 4 * 4
    assert KVRowLayout(128, 8, 64, mx.float32).row_bytes == 256 + 8 * 4
    assert KVRowLayout(64, 8, 64, mx.bfloat16).row_bytes == 128 + 2 * 4 + 8
    assert all(layout.row_bytes % 16 == 0 for layout in LAYOUTS)


@pytest.mark.parametrize(
    ("given", "reported"),
    [
        ({"head_dim": 80}, "unknown head_dim 80; choose from 32, 64, 128"),
        ({"head_dim": 64, "bits": 3}, "unknown bits 3; choose from 4, 8"),
        ({"head_dim": 64, "group_size": 128}, "unknown group_size 128; choose from 32, 64"),
        ({"head_dim": 64, "dtype": mx.int32}, "int32; choose from mlx.core.float16"),
        ({"head_dim": 32}, "groups of 64 do not fit head_dim 32; use group_size 32"),
    ],
)
def test_an_unknown_layout_is_refused_with_the_choices(given, reported):
    with pytest.raises(UserError, match=reported):
        KVRowLayout(**given)
