"""Attention for training: the plain one's values and gradients, whatever the chunks."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from fixtures.inputs import relative_error
from fixtures.tolerances import TOLERANCE

from internvl3_mlx.models.chunked_attention import chunked_attention


def draw(shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def torch_attention(q, k, v, upstream, *, causal):
    """Return output and gradients in float64: q (B, H, L, D), k v (B, KV, N, D)."""
    q, k, v = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = q @ keys.transpose(2, 3) / q.shape[-1] ** 0.5
    if causal:
        length, stored = scores.shape[2:]
        seen = torch.ones(length, stored, dtype=torch.bool).tril(stored - length)
        scores = scores.masked_fill(~seen, -torch.inf)
    out = scores.softmax(-1) @ values
    (out * torch.tensor(upstream, dtype=torch.float64)).sum().backward()
    return [x.detach().numpy() for x in (out, q.grad, k.grad, v.grad)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("length", "stored", "rows"), [(1, 1, 512), (7, 7, 3), (13, 20, 5), (37, 37, 512), (9, 9, 1)]
)
@pytest.mark.parametrize("dim", [24, 64, 128])
def test_values_and_gradients_equal_those_of_float64(length, stored, rows, dim, causal):
    q, upstream = draw((2, 6, length, dim), 1), draw((2, 6, length, dim), 2)
    k, v = draw((2, 3, stored, dim), 3), draw((2, 3, stored, dim), 4)

    def attend(q, k, v):
        return chunked_attention(q, k, v, causal=causal, rows=rows)

    arrays = [mx.array(x) for x in (q, k, v)]
    outputs, grads = mx.vjp(attend, arrays, [mx.array(upstream)])
    expected = torch_attention(q, k, v, upstream, causal=causal)
    # one key leaves gradients of zero to compare with: float64 says 0, a softmax of 1 gives 0
    for ours, theirs in zip([*outputs, *grads], expected, strict=True):
        scale = max(float(np.abs(theirs).max()), 1e-3)
        assert np.abs(np.array(ours) - theirs).max() / scale < TOLERANCE


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_values_are_the_same_bits_inside_and_outside_gradients(dtype):
    q, k, v = (mx.array(draw((1, 4, 61, 64), seed)).astype(dtype) for seed in (1, 2, 3))
    k, v = k[:, :2], v[:, :2]
    outside = chunked_attention(q, k, v, rows=16)
    inside, _ = mx.vjp(lambda *x: chunked_attention(*x, rows=16), [q, k, v], [mx.ones_like(q)])
    assert outside.dtype == dtype
    assert mx.array_equal(outside, inside[0])


def test_low_precision_rounds_only_what_goes_in_and_comes_out():
    q, k, v = (draw((1, 2, 40, 64), seed) for seed in (1, 2, 3))
    rounded = [mx.array(x).astype(mx.bfloat16) for x in (q, k, v)]
    exact = [np.array(x.astype(mx.float32)) for x in rounded]
    expected, *_ = torch_attention(*exact, np.ones_like(q), causal=True)
    ours = chunked_attention(*rounded, rows=7).astype(mx.float32)
    assert relative_error(np.array(ours), expected) < 2**-8  # half a unit in bfloat16's last place


def test_memory_grows_with_the_length_and_not_its_square():
    def peak(length):
        q, k, v = (mx.array(draw((1, 2, length, 8), seed)) for seed in (1, 2, 3))
        loss = mx.grad(lambda *x: chunked_attention(*x, rows=32).sum(), argnums=(0, 1, 2))
        mx.eval(q, k, v)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(loss(q, k, v))
        return mx.get_peak_memory() - before

    short, long = peak(512), peak(2048)
    assert long < 6 * short  # 16 times with all scores at once


def test_it_can_be_checkpointed_and_compiled():
    q, k, v = (mx.array(draw((1, 2, 11, 8), seed)) for seed in (1, 2, 3))

    def loss(q, k, v):
        return (chunked_attention(q, k, v, rows=4) ** 2).sum()

    plain = mx.grad(loss)(q, k, v)
    recomputed = mx.grad(mx.checkpoint(loss))(q, k, v)
    compiled = mx.compile(mx.grad(loss))(q, k, v)
    assert relative_error(np.array(recomputed), np.array(plain)) < TOLERANCE
    assert relative_error(np.array(compiled), np.array(plain)) < TOLERANCE
