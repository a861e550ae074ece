"""Inputs of the self-tests: they take a kernel wherever a long answer takes it.

Several splits of several blocks for every simdgroup, full blocks and ragged ones, sequences of
unequal lengths down to none, more than four heads. Scores rise from token to token for some rows
and fall for others, so that every rescaling counts; for the rest all tokens count alike, so that a
lost one is seen. What no length reaches is NaN.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from internvl3_mlx.metal_kernels.kv_layout import (
    DenseKV,
    KVRowLayout,
    KVStore,
    QuantizedKVRows,
    quantize_rows,
    split_rows,
)

KV_HEADS = 3
SPARE_TOKENS = 5  # of the capacity, which no length reaches
SLOPES = (2.0, -2.0, 0.0)  # of the scores of a row: rising, falling, level
RISE = 4.0  # of keys from the first token to the last, in units of their spread
UNREACHED = 0xFFFFFFFF  # a word whose scale is NaN


@dataclass(frozen=True)
class SelfTestRun:
    """One launch: ``lengths`` of the sequences, whose tokens are divided into ``splits``."""

    lengths: tuple[int, ...]
    splits: int


# Many tokens a split: loops over tokens go round several times. Many splits: the one over splits.
SELF_TEST_RUNS = (SelfTestRun((1537, 333, 2, 0), 3), SelfTestRun((200, 97, 2, 0), 67))


@dataclass(frozen=True)
class AttentionInputs:
    """q: (B, H, L, D); ``store`` as the kernel reads it; ``dense``: the same in float32."""

    q: mx.array
    store: KVStore
    dense: DenseKV
    lengths: mx.array


class AttentionShape(Protocol):
    """What is known of a variant: ``row_layout`` is None for a dense store."""

    @property
    def dtype(self) -> mx.Dtype: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def draft(self) -> int: ...
    @property
    def row_layout(self) -> KVRowLayout | None: ...


def attention_inputs(
    lengths: tuple[int, ...], variant: AttentionShape, rise: float = RISE
) -> AttentionInputs:
    """Make the inputs of one launch. ``rise``: of keys from the first token to the last."""
    rng = np.random.default_rng(0)
    batch, draft, dim = len(lengths), variant.draft, variant.head_dim
    capacity = max(lengths) + SPARE_TOKENS
    shape = (batch, KV_HEADS, capacity, dim)
    along = rng.choice([-1.0, 1.0], dim)  # the direction in which keys grow
    ramp = np.linspace(0, rise, capacity)[:, None]
    keys, values = rng.normal(size=shape) + ramp * along, rng.normal(size=shape)
    q = sloped_queries(rng, (batch, KV_HEADS, variant.rows, draft), along)
    reached = mx.arange(capacity)[:, None] < mx.array(lengths)[:, None, None, None]
    given = KeysValues(*(mx.array(part).astype(variant.dtype) for part in (keys, values)))
    store = make_store(given, reached, variant.row_layout)
    return AttentionInputs(
        q=mx.array(q.reshape(batch, -1, draft, dim)).astype(variant.dtype),
        store=store,
        dense=dequantize_exactly(store),
        lengths=mx.array(lengths, mx.int32),
    )


def sloped_queries(
    rng: np.random.Generator, shape: tuple[int, ...], along: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Make queries of which each neighbor in any axis has another slope along the keys' growth."""
    dim = len(along)
    q = rng.normal(size=(*shape, dim))
    q -= (q @ along / dim)[..., None] * along
    slopes = np.array(SLOPES)[np.indices(shape).sum(axis=0) % len(SLOPES)]
    return q + (slopes / dim**0.5)[..., None] * along


class KeysValues(NamedTuple):
    """(B, KV, N, D) each."""

    keys: mx.array
    values: mx.array


def make_store(given: KeysValues, reached: mx.array, row_layout: KVRowLayout | None) -> KVStore:
    """Store keys and values, NaN where they are not ``reached``."""
    if row_layout is None:
        nothing = mx.array(float("nan"), given.keys.dtype)
        return DenseKV(*(mx.where(reached, part, nothing) for part in given))
    rows = quantize_rows(given.keys, given.values, row_layout)
    return QuantizedKVRows(mx.where(reached, rows, mx.array(UNREACHED, mx.uint32)), row_layout)


def dequantize_exactly(store: KVStore) -> DenseKV:
    """Return what a store holds in float32, as the kernel computes: not rounded to 16 bits."""
    if isinstance(store, DenseKV):
        return DenseKV(*(part.astype(mx.float32) for part in store.dequantize()))
    parts = (
        mx.dequantize(
            words, scales.astype(mx.float32), biases.astype(mx.float32),
            group_size=store.group_size, bits=store.bits,
        )
        for words, scales, biases in split_rows(store.rows, store.layout)
    )  # fmt: skip
    return DenseKV(*parts)
