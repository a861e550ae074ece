"""Attention of some query rows to keys and values: dense, quantized, or in two segments.

Pure functions of arrays. Which of them answers for a layer is the choice of its cache
(``models.cache``), so a new kind of cache changes nothing here.
"""

from dataclasses import dataclass

import mlx.core as mx

from internvl3_mlx.device import on_gpu
from internvl3_mlx.metal_kernels import dispatch, flash_decode, fused_quantized, registry
from internvl3_mlx.metal_kernels.kv_layout import KVStore, QuantizedArrays, QuantizedKV

RowSelection = slice | mx.array  # of the L new tokens: a slice, or their indices (R,)
ALL_ROWS, LAST_ROW = slice(None), slice(-1, None)

# with more query rows than our kernels take, dequantizing the cache once costs less
MAX_KERNEL_ROWS = flash_decode.MAX_DRAFT_TOKENS


def causal_attention(
    q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None
) -> mx.array:
    """Attend with MLX's fused attention. q: (B, H, L, D), k v: (B, KV, N, D) -> (B, H, L, D).

    The causal mask is aligned to the lower right: the L rows are the last of the N tokens. A
    boolean ``mask``, broadcast to (B, H, L, N), takes its place.
    """
    if mask is not None and q.shape[2] == 1 and mask.shape[1:-1] == (1, 1) and not on_gpu():
        return masked_row_attention(q, k, v, mask)
    causal = "causal" if q.shape[2] > 1 else None
    return mx.fast.scaled_dot_product_attention(
        q, k, v, scale=q.shape[-1] ** -0.5, mask=causal if mask is None else mask
    )


def masked_row_attention(q: mx.array, k: mx.array, v: mx.array, mask: mx.array) -> mx.array:
    """Attend from one row of each sequence, (B, H, 1, D), as ``causal_attention`` does.

    mask: (B or 1, 1, 1, N). A CPU has no fused attention, and what MLX has in its place takes more
    operations: here the heads that share keys are the rows of one product, and ``mx.compile`` joins
    scale and mask.
    """
    rows = q.reshape(*k.shape[:2], -1, q.shape[-1])
    scores = rows @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5
    scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
    return (mx.softmax(scores, axis=-1, precise=True) @ v).reshape(q.shape)


@dataclass(frozen=True)
class SlidingAttention:
    """What attention has beside queries, keys and values in some families' layers.

    ``window``: tokens that a token attends to, itself included; None for all before it. ``sinks``:
    one logit for each head that joins the softmax and adds no value, (H,) (arXiv 2309.17453).
    """

    window: int | None = None
    sinks: mx.array | None = None


def sliding_attention(
    q: mx.array, k: mx.array, v: mx.array, layer: SlidingAttention, mask: mx.array | None = None
) -> mx.array:
    """Attend causally within a window and with sinks. q: (B, H, L, D), k v: (B, KV, N, D).

    The L rows are the last of the N tokens. mask: broadcast to (B, 1, 1, N), True for the keys that
    exist; None for all -> (B, H, L, D).
    """
    length, stored = q.shape[2], k.shape[2]
    if layer.window is not None and stored > layer.window + length - 1:  # the rest is out of sight
        first = stored - layer.window - length + 1
        k, v, stored = k[:, :, first:], v[:, :, first:], stored - first
        mask = None if mask is None else mask[..., first:]
    row, column = mx.arange(stored - length, stored)[:, None], mx.arange(stored)
    visible = row >= column
    if layer.window is not None:
        visible = visible & (row - column < layer.window)
    return mx.fast.scaled_dot_product_attention(
        q,
        k,
        v,
        scale=q.shape[-1] ** -0.5,
        mask=visible if mask is None else visible & mask,
        sinks=None if layer.sinks is None else layer.sinks.astype(q.dtype),
    )


def kernels_enabled() -> bool:
    """Return whether any of our kernels may be chosen on this machine.

    Asked once for each layer and token, so it does not look at shapes.
    """
    return bool(registry.faster_cases()) or dispatch.kernel_mode() == dispatch.FORCE


def store_attention(q: mx.array, store: KVStore, length: int) -> mx.array:
    """Attend causally to the first ``length`` tokens of a store: (B, H, L, D) -> (B, H, L, D).

    A few rows go to our kernel where it was measured to be faster; a prompt never does.
    """
    few = q.shape[2] <= MAX_KERNEL_ROWS
    attend = flash_decode.attend_fastest if few else flash_decode.attend_mlx
    return attend(q, store, length, causal=q.shape[2] > 1)


def ragged_attention(
    q: mx.array, store: KVStore, lengths: mx.array, longest: int, mask: mx.array
) -> mx.array:
    """Attend from one row of each sequence to its own tokens: (B, H, 1, D) -> (B, H, 1, D).

    lengths: tokens of each sequence, (B,) int32, of which the longest has ``longest``. mask: the
    same, (B, 1, 1, longest).
    """
    variant = flash_decode.FlashVariant.from_inputs(q, store)
    if kernels_enabled() and flash_decode.should_use_kernel(variant, longest):
        return flash_decode.flash_decode_kernel(q, store, lengths)[0]
    keys, values = store.first_tokens(longest).dequantize()
    return causal_attention(q, keys, values, mask)


def quantized_store_attention(q: mx.array, store: QuantizedKV) -> mx.array:
    """Attend causally to all tokens of a store, a few rows: (B, H, L, D) -> (B, H, L, D).

    By MLX's own fused function, if it has one and it was measured to be faster, else by products.
    """
    if fused_quantized.prefers_fused(q, store):
        return fused_quantized.fused_attention(q, store)
    return quantized_attention(
        q, store.keys, store.values, bits=store.bits, group_size=store.group_size
    )


def quantized_attention(
    q: mx.array,
    keys: QuantizedArrays,
    values: QuantizedArrays,
    *,
    bits: int,
    group_size: int,
    mask: mx.array | None = None,
) -> mx.array:
    """Attend causally with two quantized products, for a few rows.

    q: (B, H, L, D); keys, values: ``mx.quantize``'s arrays of (B, KV, N, D) -> (B, H, L, D). mask:
    True where a row sees a token, (B, 1, L, N), where the rows are not the last of the tokens.
    """
    batch, heads, length, dim = q.shape
    kv_heads, stored = keys[0].shape[1], keys[0].shape[2]

    def matmul(x: mx.array, arrays: QuantizedArrays, *, transpose: bool) -> mx.array:
        weights, scales, biases = (array[:, :, None] for array in arrays)
        return mx.quantized_matmul(
            x, weights, scales, biases, transpose=transpose, group_size=group_size, bits=bits
        )

    grouped = (q * dim**-0.5).reshape(batch, kv_heads, heads // kv_heads, length, dim)
    scores = matmul(grouped, keys, transpose=True)
    if mask is None and length > 1:
        mask = mx.arange(stored - length, stored)[:, None] >= mx.arange(stored)
    if mask is not None:
        mask = mask[:, :, None] if mask.ndim == 4 else mask  # (B, KV, heads of each, L, N)
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
    weights = mx.softmax(scores, axis=-1, precise=True)
    return matmul(weights, values, transpose=False).reshape(q.shape)


def shared_prefix_attention(
    q: mx.array, prefix: tuple[KVStore, int], suffix: tuple[KVStore, int]
) -> mx.array:
    """Attend to one prefix for all sequences and to each one's own suffix. q: (N, H, 1, D).

    Each segment is a store and the number of its tokens; the prefix is (1, KV, P, D), the suffix
    (N, KV, S, D). The prefix is read once for as many sequences as the kernel takes rows, and both
    results are merged by their log-sum-exp -> (N, H, 1, D).
    """
    kv_heads = prefix[0].arrays[0].shape[1]
    chunk = max(1, flash_decode.MAX_QUERY_ROWS * kv_heads // q.shape[1])
    parts = [
        flash_decode.flash_decode(flash_decode.batch_to_queries(rows), *prefix)
        for rows in mx.split(q, range(chunk, q.shape[0], chunk))
    ]
    out = mx.concatenate([flash_decode.queries_to_batch(part) for part, _ in parts])
    lse = mx.concatenate([flash_decode.queries_to_batch(part) for _, part in parts])
    merged, _ = flash_decode.merge_attention(out, lse, *flash_decode.flash_decode(q, *suffix))
    return merged
