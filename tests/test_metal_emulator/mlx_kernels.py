"""MLX's own kernels, from the headers inside its wheel, with launches like MLX's and references."""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from metal_emulator import Binding, Run, compile_kernel, dispatch

METAL_NAMES = {"float32": "float", "float16": "half", "bfloat16": "bfloat16_t"}
TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.5e-2}
WIDTH = 32  # lanes
NONE = dict.fromkeys((20, 21, 22, 23, 24, 25), False)  # attention's function constants
FOLDER = "mlx/backend/metal/kernels"
Outputs = dict[int, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One kernel with its inputs: ``compare`` gives what came out and what should have."""

    headers: tuple[str, ...]
    instance: str  # the kernel's name and template arguments
    bindings: Mapping[int, Binding]
    groups: tuple[int, int, int]
    group: tuple[int, int, int]
    compare: Callable[[Outputs], tuple[np.ndarray, np.ndarray]]
    constants: Mapping[int, bool | int] = field(default_factory=dict)

    @property
    def text(self) -> str:
        headers = ("utils.h", *self.headers)
        included = "".join(f'#include "{FOLDER}/{header}"\n' for header in headers)
        return f'{included}# 1 "case.metal"\ninstantiate_kernel("case", {self.instance})\n'

    def run(self, text: str | None = None, schedule: int = 0) -> Run:
        compiled = compile_kernel(text or self.text, "case", self.constants)
        threads = [n * size for n, size in zip(self.groups, self.group, strict=True)]
        return dispatch(compiled, self.bindings, threads, self.group, schedule)

    def error(self, run: Run) -> float:
        """Give the largest error, relative to the largest value wanted."""
        got, want = self.compare(run.outputs)
        return float(np.abs(got - want).max() / np.abs(want).max())


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round to the type; bfloat16 travels as uint16."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def decode(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)


def normal(dtype: str, *shape: int, seed: int = 0) -> np.ndarray:
    return encode(np.random.default_rng(seed).normal(size=shape), dtype)


def output(*shape: int, dtype: str = "float32") -> Binding:
    return Binding(np.zeros(shape, {"bfloat16": np.uint16}.get(dtype, dtype)), True, False)


def number(kind: str, *values: float) -> Binding:
    return Binding(np.array(values, kind))


def softmax(dtype: str, looped: bool = False) -> Case:
    """Softmax of ragged rows, in one pass or in a loop."""
    rows, n, group = (2, 4500, WIDTH * WIDTH) if looped else (3, 333, WIDTH * 3)
    x = normal(dtype, rows, n)
    e = np.exp(decode(x) - decode(x).max(-1, keepdims=True))
    return Case(
        ("softmax.h",),
        f"softmax_{'looped' if looped else 'single_row'}, {METAL_NAMES[dtype]}, float",
        {0: Binding(x), 1: output(rows, n, dtype=dtype), 2: number("int32", n)},
        (rows, 1, 1),
        (group, 1, 1),
        lambda out: (decode(out[1]), e / e.sum(-1, keepdims=True)),
    )


def logsumexp(dtype: str) -> Case:
    """The logarithm of a sum of exponentials, looped over ragged rows."""
    rows, n = 2, 4500
    x = normal(dtype, rows, n)
    want = np.log(np.exp(decode(x)).sum(-1))
    return Case(
        ("logsumexp.h",),
        f"logsumexp_looped, {METAL_NAMES[dtype]}, float",
        {0: Binding(x), 1: output(rows, dtype=dtype), 2: number("int32", n)},
        (rows, 1, 1),
        (WIDTH * WIDTH, 1, 1),
        lambda out: (decode(out[1]), want),
    )


def cross_entropy(dtype: str) -> Case:
    """Cross entropy of ragged rows; a negative target counts from the end."""
    rows, n = 3, 777
    x, targets = normal(dtype, rows, n), np.array([5, 776, -2], np.int32)
    wide = decode(x)
    want = np.log(np.exp(wide).sum(-1)) - wide[np.arange(rows), targets]
    return Case(
        ("cross_entropy.h",),
        f"cross_entropy, {METAL_NAMES[dtype]}, float",
        {0: Binding(x), 1: Binding(targets), 2: output(rows), 3: number("int32", n)},
        (rows, 1, 1),
        (WIDTH * 2, 1, 1),
        lambda out: (decode(out[2]), want),
    )


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Attend in float64. q: (B, H, L, D), k and v: (B, KV, S, D), mask: (L, S) of bool."""
    shared = q.shape[1] // k.shape[1]
    k, v = np.repeat(decode(k), shared, 1), np.repeat(decode(v), shared, 1)
    scores = decode(q) @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5
    scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


B, KV, R, S, D = 2, 2, 3, 77, 64


def _decode_inputs(dtype: str, shared: int, rows: int) -> list[np.ndarray]:
    shapes = ((B, KV * shared, rows, D), (B, KV, S, D), (B, KV, S, D))
    return [normal(dtype, *shape, seed=seed) for seed, shape in enumerate(shapes)]


def sdpa_vector(dtype: str) -> Case:
    """One-pass decode attention: three query rows, shared key heads, a mask of bool."""
    rows = 3
    q, k, v = _decode_inputs(dtype, R, rows)
    mask = np.random.default_rng(9).random((rows, S)) < 0.7
    want = attention(q, k, v, mask)
    strides = (number("uint64", n) for n in (S * D, D, S * D, D))
    return Case(
        ("sdpa_vector.h",),
        f"sdpa_vector, {METAL_NAMES[dtype]}, {D}, {D}",
        {
            **dict(enumerate((Binding(q), Binding(k), Binding(v), output(*q.shape, dtype=dtype)))),
            4: number("int32", R),
            5: number("int32", S),
            **dict(enumerate(strides, 6)),
            10: number("float32", D**-0.5),
            11: Binding(mask),
            **{13: number("int32", 1), 14: number("int32", S), 15: number("int32", 0)},
        },
        (B * KV * R, rows, 1),
        (WIDTH * WIDTH, 1, 1),
        lambda out: (decode(out[3]), want),
        {**NONE, 20: True, 23: True},
    )


def sdpa_first_pass(dtype: str, gqa: bool = False) -> Case:
    """The first of two decode passes, its parts combined in float64."""
    shared, blocks = (8 if gqa else R), 32
    q, k, v = _decode_inputs(dtype, shared, 1)
    heads = KV * shared
    want = attention(q, k, v, np.ones((1, S), bool))

    def compare(out: Outputs) -> tuple[np.ndarray, np.ndarray]:
        parts, sums, peaks = (decode(out[i]) for i in (3, 4, 5))
        weights = np.exp(peaks - peaks.max(-1, keepdims=True))
        total = (weights * sums).sum(-1)[..., None]
        return (weights[..., None] * parts).sum(-2) / total, want

    name = "sdpa_vector_2pass_1" + ("_gqa" if gqa else "")
    kind = METAL_NAMES[dtype]
    strides = (number("uint64", n) for n in (S * D, D, S * D, D))
    return Case(
        ("sdpa_vector.h",),
        f"{name}, {kind}, {D}, {D}" + (f", {shared}, 4" if gqa else ""),
        {
            **{0: Binding(q), 1: Binding(k), 2: Binding(v)},
            3: output(B, heads, 1, blocks, D, dtype=dtype),
            4: output(B, heads, 1, blocks),
            5: output(B, heads, 1, blocks),
            7: number("int32", S),
            **dict(enumerate(strides, 8)),
            12: number("float32", D**-0.5),
        },
        (KV, B, blocks),
        (WIDTH, shared, 1),
        compare,
        {**NONE, 26: blocks},
    )


def sdpa_second_pass(dtype: str) -> Case:
    """The second of two decode passes."""
    heads, rows, blocks = 5, 2, 64
    parts = normal(dtype, heads, rows, blocks, D)
    sums, peaks = (np.abs(normal("float32", heads, rows, blocks, seed=s)) for s in (1, 2))
    weights = np.exp(decode(peaks) - decode(peaks).max(-1, keepdims=True))
    total = (weights * sums).sum(-1)[..., None]
    want = (weights[..., None] * decode(parts)).sum(-2) / total
    return Case(
        ("sdpa_vector.h",),
        f"sdpa_vector_2pass_2, {METAL_NAMES[dtype]}, {D}",
        {
            **{0: Binding(parts), 1: Binding(sums), 2: Binding(peaks)},
            3: output(heads, rows, D, dtype=dtype),
            4: number("int32", blocks),
        },
        (heads, rows, 1),
        (WIDTH * WIDTH, 1, 1),
        lambda out: (decode(out[3]), want),
    )


def quantized_matvec(dtype: str, bits: int = 4, fast: bool = True) -> Case:
    """Packed weights times vectors; the general kernel takes a ragged length."""
    group_size, vectors, rows, n = 64, 2, 24, 512 if fast else 192
    rng = np.random.default_rng(4)
    codes = rng.integers(0, 1 << bits, (rows, n), dtype=np.uint32)
    packed = codes.reshape(rows, -1, 32 // bits) << np.arange(0, 32, bits, dtype=np.uint32)
    scales, biases = (normal(dtype, rows, n // group_size, seed=s) for s in (5, 6))
    x = normal(dtype, vectors, n, seed=7)
    weights = codes * np.repeat(decode(scales), group_size, 1)
    want = decode(x) @ (weights + np.repeat(decode(biases), group_size, 1)).T
    unused = {i: number("int64", 0) for i in range(7, 15)}
    return Case(
        ("steel/gemm/gemm.h", "quantized_utils.h", "quantized.h"),
        f"affine_qmv{'_fast' if fast else ''}, {METAL_NAMES[dtype]}, {group_size}, {bits}, false",
        {
            **unused,
            0: Binding(packed.sum(-1, dtype=np.uint32)),
            **{1: Binding(scales), 2: Binding(biases), 3: Binding(x)},
            4: output(vectors, rows, dtype=dtype),
            **{5: number("int32", n), 6: number("int32", rows)},
        },
        (vectors, rows // 8, 1),
        (WIDTH, 2, 1),
        lambda out: (decode(out[4]), want),
    )


def steel_attention(dtype: str, masked: bool = True) -> Case:
    """Prefill attention on simdgroup matrices: ragged blocks, a mask of bool or causal."""
    rows, heads, bq, bk = 41, 2, 32, 16
    q = normal(dtype, 1, heads, rows, D)
    k, v = (normal(dtype, 1, 1, S, D, seed=s) for s in (1, 2))
    causal = np.arange(S) <= np.arange(rows)[:, None] + S - rows
    mask = np.random.default_rng(8).random((rows, S)) < 0.6 if masked else causal
    want = attention(q, k, v, mask)
    blocks, key_blocks = -(-rows // bq), -(-S // bk)
    sizes = (1, heads, D, rows, S, heads), D**-0.5, (blocks, key_blocks, rows // bq, S // bk)
    tail = (rows % bq, S % bk, S - rows)
    strides = (heads * rows * D, rows * D, D, S * D, S * D, D, S * D, S * D, D)
    packed = struct.pack("6if7i12q", *sizes[0], sizes[1], *sizes[2], *tail, *strides, *strides[:3])
    kind = METAL_NAMES[dtype]
    return Case(
        ("steel/attn/kernels/steel_attention.h",),
        f"attention, {kind}, {bq}, {bk}, {D}, {D}, 4, 1, {'bool' if masked else kind}, float",
        {
            **{0: Binding(q), 1: Binding(k), 2: Binding(v), 3: output(*q.shape, dtype=dtype)},
            4: Binding(np.frombuffer(packed, np.uint8)),
            **({5: number("int64", 0, 0, S), 6: Binding(mask)} if masked else {}),
        },
        (blocks, heads, 1),
        (WIDTH, 4, 1),
        lambda out: (decode(out[3]), want),
        {200: False, 201: False, 300: masked, 301: not masked, 302: False, 303: False},
    )


CASES: dict[str, Callable[[str], Case]] = {
    "softmax": softmax,
    "softmax, looped": lambda dtype: softmax(dtype, looped=True),
    "logsumexp": logsumexp,
    "cross entropy": cross_entropy,
    "decode attention": sdpa_vector,
    "decode attention, first pass": sdpa_first_pass,
    "decode attention, first pass for shared heads": lambda dtype: sdpa_first_pass(dtype, gqa=True),
    "decode attention, second pass": sdpa_second_pass,
    "4-bit matrix times vector": quantized_matvec,
    "8-bit matrix times vector": lambda dtype: quantized_matvec(dtype, bits=8, fast=False),
    "prefill attention, bool mask": steel_attention,
    "prefill attention, causal": lambda dtype: steel_attention(dtype, masked=False),
}
