"""Join attention over two stretches of keys, and rows that share one of them."""

import mlx.core as mx


def merge(
    out_a: mx.array, lse_a: mx.array, out_b: mx.array, lse_b: mx.array
) -> tuple[mx.array, mx.array]:
    """Weigh two results by their log-sum-exp. out: (B, H, L, D), lse: (B, H, L) float32, twice
    -> the same of both stretches together."""
    top = mx.maximum(lse_a, lse_b)
    weight_a, weight_b = mx.exp(lse_a - top), mx.exp(lse_b - top)
    total = weight_a + weight_b
    share_a, share_b = (weight_a / total)[..., None], (weight_b / total)[..., None]
    out = out_a.astype(mx.float32) * share_a + out_b.astype(mx.float32) * share_b
    return out.astype(out_a.dtype), top + mx.log(total)


def as_rows(q: mx.array) -> mx.array:
    """Let candidates read one prefix together: (N, H, 1, D) -> (1, H, N, D)."""
    return q.swapaxes(0, 2)


def as_batch(x: mx.array) -> mx.array:
    """Give each candidate its own again: (1, H, N, D) -> (N, H, 1, D), (1, H, N) -> (N, H, 1)."""
    return x.swapaxes(0, 2)
