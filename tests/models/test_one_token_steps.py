"""A step of one token of each sequence takes fewer operations, and gives what the long way does."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from fixtures.fused_sizes import attention_float64, draw
from fixtures.inputs import relative_error
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe
from fixtures.tolerances import chain_tolerance

from benchmarks.kernel_count import count_batch_nodes, kernels_per_layer, read_batch
from internvl3_mlx import load
from internvl3_mlx.device import on_gpu
from internvl3_mlx.models.attention import masked_row_attention
from internvl3_mlx.models.fused_linear import WIDE_RATIO, fuse_linears

LENGTHS = (13, 5, 9)
MOST_NODES = 41  # of a layer of a batch in float32, views too
only_on_a_cpu = pytest.mark.skipif(on_gpu(), reason="a GPU does it otherwise")


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 1), (2, 2)])
def test_masked_rows_attend_to_their_own_tokens(heads, kv_heads, dtype):
    q, k, v = draw(dtype, (3, heads, 1, 12), *[(3, kv_heads, 17, 12)] * 2)
    mask = (mx.arange(17) < mx.array(LENGTHS)[:, None])[:, None, None]
    ours = np.array(masked_row_attention(q, k, v, mask).astype(mx.float32), np.float64)
    for row, n in enumerate(LENGTHS):
        own = slice(row, row + 1)
        expected = attention_float64(q[own], k[own, :, :n], v[own, :, :n])
        assert relative_error(ours[own], expected) < chain_tolerance(dtype)


@pytest.mark.parametrize("style", ["300m", "6b", "gpt_oss"])
def test_states_without_the_axis_of_tokens_are_those_with_it(style):
    model = load(str(tiny(Recipe(style=style)).folder)).model
    found = []
    for ids in (mx.array([7, 3, 11]), mx.array([[7], [3], [11]])):
        batch = read_batch(model, LENGTHS)
        batch.begin_step()
        rotary = model.language_model.ragged_rotary(LENGTHS, [None] * 3)
        found.append(model.language_model.model(model.embed(ids), rotary, batch.layers))
        batch.end_step()
    assert found[0].ndim == 2
    assert mx.allclose(found[0], found[1].squeeze(1), rtol=1e-5, atol=1e-6)


@only_on_a_cpu
@pytest.mark.parametrize(
    ("columns", "dtype", "by_column"),
    [(6, mx.float32, True), (7, mx.float32, False), (6, mx.float16, False)],
)
def test_a_wide_joined_matrix_is_kept_by_columns_on_a_cpu(columns, dtype, by_column):
    heights = [WIDE_RATIO * 3, WIDE_RATIO * 3 + 1]  # wide for 6 columns, not for 7
    weights = draw(dtype, *[(height, columns) for height in heights])
    joined, x = joined_layer(weights), draw(dtype, (4, columns))[0]
    assert is_kept_by_column(joined.weight) == by_column
    expected = mx.concatenate([x @ weight.T for weight in weights], axis=-1)
    assert mx.allclose(joined(x), expected, atol=1e-5 if dtype == mx.float32 else 1e-2)


def joined_layer(weights):
    """Return the linear layer that two without biases are joined to."""
    module = nn.Module()
    for name, weight in zip("ab", weights, strict=True):
        module[name] = nn.Linear(*reversed(weight.shape), bias=False)
        module[name].weight = weight
    fuse_linears(module, ["a", "b"], "both")
    return module.both


def is_kept_by_column(weight):
    mx.eval(weight)
    strides = np.array(weight, copy=False).strides
    return strides[0] < strides[1]


@only_on_a_cpu
def test_no_step_of_a_batch_has_more_operations_than_it_needs():
    model = load(str(tiny(Recipe()).folder)).model
    assert kernels_per_layer(model, compiled=True, count=count_batch_nodes) <= MOST_NODES
