"""Every MLX operation that we use, in every dtype and quantization mode, on small inputs.

The result of the default device is compared with a plain formula in float32 on the CPU of the same
machine, so that a red test on a Mac can be traced to an operation.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from internvl3_mlx.affine_quantize import quantize_exactly
from internvl3_mlx.models.attention import causal_attention
from internvl3_mlx.models.layers import gelu, swiglu
from internvl3_mlx.models.rope import Rotary
from internvl3_mlx.models.vision import fused_attention
from internvl3_mlx.profiling.plain_formulas import (
    BASE,
    EPSILON,
    largest_and_sums,
    layer_norm,
    lower_right,
    normal,
    plain_attention,
    plain_gelu,
    plain_rotation,
    plain_swiglu,
    relative_error,
    rms_norm,
)

Inputs = Sequence[mx.array]
Compute = Callable[..., mx.array]

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
# of the largest value; 16-bit sums may round at every step
TOLERANCES = {mx.float32: 1e-4, mx.float16: 0.02, mx.bfloat16: 0.1}
TF32_ERROR = 5e-3  # products with 10 bits: a GPU's choice, not an error
AFFINE_BITS, AFFINE_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
# mode, bits, group size -> the error of rounding, of the largest value
FLOAT_MODES = {("mxfp4", 4, 32): 0.3, ("mxfp8", 8, 32): 0.08, ("nvfp4", 4, 16): 0.2}
# rows, inputs, outputs: MLX has other kernels for one row, and for sizes that are no multiples
PRODUCTS = ((1, 512, 40), (33, 256, 42))
HEADS, KV_HEADS, LENGTH = 6, 2, 37


class Outcome(Enum):
    """``REDUCED``: the device computes float32 products with fewer bits, as it was set to."""

    OK = "ok"
    REDUCED = "TF32"
    WRONG = "WRONG"


@dataclass(frozen=True)
class SmokeResult:
    """The outcome of one operation; ``detail``: the error in each dtype."""

    name: str
    outcome: Outcome
    detail: str


@dataclass(frozen=True)
class Operation:
    """An operation and what it is compared with.

    make_inputs: called with a seed. reference: a plain formula of the same inputs in float32.
    dtypes: of the floating inputs. tolerance: for float32, in place of the usual one.
    """

    compute: Compute
    reference: Compute
    make_inputs: Callable[[], Inputs]
    dtypes: tuple[mx.Dtype, ...] = DTYPES
    tolerance: float | None = None

    def error(self, dtype: mx.Dtype) -> float:
        """Return the largest difference, of the largest value of the reference."""
        with mx.stream(mx.cpu):
            inputs = [cast(x, dtype) for x in self.make_inputs()]
            mx.eval(inputs)
        found = self.compute(*inputs)
        mx.eval(found)
        with mx.stream(mx.cpu):
            wanted = self.reference(*(cast(x, mx.float32) for x in inputs))
            return relative_error(found, wanted)


def run_smoke_test() -> Iterator[SmokeResult]:
    """Run all operations in order; a failure is a result."""
    for name, operations in SMOKE_TEST.items():
        yield judge(name, operations)


def judge(name: str, operations: Sequence[Operation]) -> SmokeResult:
    """Run the variants of one operation and keep the largest error of each dtype."""
    errors: dict[mx.Dtype, float] = {}
    beyond: set[mx.Dtype] = set()
    for operation in operations:
        for dtype in operation.dtypes:
            try:
                error = operation.error(dtype)
            except Exception as fault:  # noqa: BLE001  every failure is reported
                detail = f"{dtype_name(dtype)}: {type(fault).__name__}: {fault}"
                return SmokeResult(name, Outcome.WRONG, detail)
            errors[dtype] = max(errors.get(dtype, 0.0), error)
            # not "error > tolerance": that is false for NaN
            if not error <= (operation.tolerance or TOLERANCES[dtype]):
                beyond.add(dtype)
    outcome = Outcome.WRONG if beyond else Outcome.OK
    if beyond == {mx.float32} and errors[mx.float32] <= TF32_ERROR and name in MATRIX_PRODUCTS:
        outcome = Outcome.REDUCED
    shown = ", ".join(f"{dtype_name(dtype)} {error:.0e}" for dtype, error in errors.items())
    return SmokeResult(name, outcome, f"relative error {shown}")


def cast(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """Cast floating arrays; leave indices, words and masks."""
    return x.astype(dtype) if mx.issubdtype(x.dtype, mx.floating) else x


def dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def product_inputs(rows: int, width: int, outputs: int) -> Inputs:
    return [normal(rows, width), normal(outputs, width, seed=1)]


def norm_inputs(width: int) -> Inputs:
    return [normal(LENGTH, width), normal(width, seed=1)]


def attention_operation(dim: int, length: int, stored: int) -> Operation:
    return Operation(
        causal_attention,
        lambda q, k, v: plain_attention(q, k, v, lower_right(length, stored)),
        lambda: [
            normal(1, HEADS, length, dim),
            *(normal(1, KV_HEADS, stored, dim, seed=n) for n in (1, 2)),
        ],
    )


def masked_attention_operation(dim: int) -> Operation:
    """A batch of two sequences, the second with empty columns before it."""

    def visible() -> mx.array:
        return (mx.arange(LENGTH) >= mx.array([[0], [30]]))[:, None, None]

    return Operation(
        lambda q, k, v: causal_attention(q, k, v, visible()),
        lambda q, k, v: plain_attention(q, k, v, visible()),
        lambda: [
            normal(2, HEADS, 1, dim),
            *(normal(2, KV_HEADS, LENGTH, dim, seed=n) for n in (1, 2)),
        ],
    )


def tile_attention_operation(dim: int) -> Operation:
    return Operation(
        fused_attention, plain_attention, lambda: [normal(1, 2, 129, dim, seed=n) for n in range(3)]
    )


def quantized_operations(mode: str, bits: int, group: int) -> list[Operation]:
    """Products of a few and of one row with a quantized matrix, and its numbers themselves."""
    form: dict[str, Any] = {"group_size": group, "bits": bits, "mode": mode}

    def packed(weight: mx.array) -> tuple[mx.array, mx.array, mx.array | None]:
        words, scales, *biases = mx.quantize(weight, **form, stream=mx.cpu)
        return words, scales, biases[0] if biases else None

    def product(x: mx.array, weight: mx.array) -> mx.array:
        words, scales, biases = packed(weight)
        return mx.quantized_matmul(x, words, scales, biases, transpose=True, **form)

    def numbers(weight: mx.array) -> mx.array:
        words, scales, biases = packed(weight)
        return mx.dequantize(words, scales, biases, **form)

    def exact(weight: mx.array) -> mx.array:
        words, scales, biases = packed(weight)
        return mx.dequantize(words, scales, biases, **form, stream=mx.cpu).astype(mx.float32)

    dtypes = DTYPES if mode == "affine" else DTYPES[1:]
    products = [
        Operation(
            product,
            lambda x, weight: x @ exact(weight).T,
            partial(product_inputs, *shape),
            dtypes,
        )
        for shape in PRODUCTS
    ]
    return [*products, Operation(numbers, exact, lambda: [normal(5, 256)], dtypes)]


def quantization_operation(mode: str, bits: int, group: int, step: float) -> Operation:
    """Numbers that are quantized on the device are within a rounding step of the given ones."""
    form: dict[str, Any] = {"group_size": group, "bits": bits, "mode": mode}

    def there_and_back(x: mx.array) -> mx.array:
        parts: Sequence[mx.array]
        if mode == "affine":
            parts = quantize_exactly(x, group_size=group, bits=bits)
        else:
            parts = mx.quantize(x, **form)
        words, scales, *biases = parts
        return mx.dequantize(words, scales, biases[0] if biases else None, **form, stream=mx.cpu)

    inputs = lambda: [normal(3, 256)]  # noqa: E731
    return Operation(there_and_back, lambda x: x, inputs, (mx.float32,), tolerance=step)


def gradient_operation() -> Operation:
    """Gradients through embedding, norm, activation and product, as training takes them."""

    def loss(table: mx.array, weight: mx.array, ids: mx.array, *, plain: bool) -> mx.array:
        x = table[ids]
        x = rms_norm(x) if plain else mx.fast.rms_norm(x, None, EPSILON)
        act = plain_swiglu(x, x) if plain else swiglu(x, x)
        return mx.square(act @ weight).sum()

    def gradients(plain: bool) -> Compute:
        def compute(table: mx.array, weight: mx.array, ids: mx.array) -> mx.array:
            def of(table: mx.array, weight: mx.array) -> mx.array:
                return loss(table, weight, ids, plain=plain)

            both = mx.grad(of, argnums=(0, 1))(table, weight)
            return mx.concatenate([part.reshape(-1) / mx.abs(part).max() for part in both])

        return compute

    ids = mx.array([3, 1, 3, 3, 0, 7])
    inputs = lambda: [normal(9, 64), normal(64, 24, seed=1) / 8, ids]  # noqa: E731
    return Operation(gradients(False), gradients(True), inputs)


def write_in_the_middle(x: mx.array, new: mx.array) -> mx.array:
    """Write two rows by an index on the device, and one by a slice, as the caches do."""
    out = mx.slice_update(x, new, mx.array([3]), axes=(0,))
    out[1:2] = new[:1]
    return mx.concatenate([out, new])


def drawn(seed: int) -> mx.array:
    return mx.random.uniform(shape=(65,), key=mx.random.key(seed))


FRACTIONS = (4.0, 4.0625, 700.5, 3000.25)
# the operations whose float32 products may have fewer bits
MATRIX_PRODUCTS = {
    "matrix product",
    "product and sum",
    "gradients",
    "attention in a tile",
    "causal attention",
    "attention of one row",
    "attention with a mask",
    *(f"quantized product, affine, {bits} bits" for bits in AFFINE_BITS),
}
INTEGERS = (mx.float32,)  # for results that must be exact
EXACT = 1e-12

SMOKE_TEST: dict[str, list[Operation]] = {
    "matrix product": [
        Operation(
            lambda x, w: x @ w.T,
            lambda x, w: x @ w.T,
            partial(product_inputs, *shape),
        )
        for shape in PRODUCTS
    ],
    "product and sum": [
        Operation(
            lambda bias, x, w: mx.addmm(bias, x, w),
            lambda bias, x, w: x @ w + bias,
            lambda: [normal(40), normal(33, 96, seed=1), normal(96, 40, seed=2)],
        )
    ],
    "attention in a tile": [tile_attention_operation(dim) for dim in (64, 128)],
    "causal attention": [
        attention_operation(dim, length, stored)
        for dim in (64, 128)
        for length, stored in ((LENGTH, LENGTH), (LENGTH, 129), (8, 129))
    ],
    "attention of one row": [attention_operation(dim, 1, 129) for dim in (64, 128)],
    "attention with a mask": [masked_attention_operation(dim) for dim in (64, 128)],
    "fused rotary": [
        Operation(
            Rotary(64, BASE, 5),
            lambda x: plain_rotation(x, range(5, 5 + LENGTH)),
            lambda: [normal(1, LENGTH, HEADS, 64)],
        )
    ],
    "rotary by tables": [
        Operation(
            lambda x: Rotary(64, BASE, mx.array(FRACTIONS))(x),
            lambda x: plain_rotation(x, FRACTIONS),
            lambda: [normal(1, len(FRACTIONS), HEADS, 64)],
            tolerance=1e-3,
            dtypes=INTEGERS,
        )
    ],
    "RMS norm": [
        Operation(
            lambda x, w: mx.fast.rms_norm(x, w, EPSILON),
            lambda x, w: rms_norm(x) * w,
            partial(norm_inputs, width),
        )
        for width in (96, 5120)
    ],
    "layer norm": [
        Operation(
            lambda x, w, b: mx.fast.layer_norm(x, w, b, EPSILON),
            layer_norm,
            lambda: [normal(LENGTH, 1024), normal(1024, seed=1), normal(1024, seed=2)],
        )
    ],
    "softmax": [
        Operation(
            lambda x: mx.softmax(x, axis=-1, precise=True),
            lambda x: mx.exp(x) / mx.exp(x).sum(axis=-1, keepdims=True),
            lambda: [normal(3, 1025)],
        )
    ],
    "logsumexp": [
        Operation(
            lambda x: mx.logsumexp(x.astype(mx.float32), axis=-1),
            lambda x: mx.log(mx.exp(x).sum(axis=-1)),
            lambda: [normal(3, 1025)],
        )
    ],
    "GELU": [Operation(gelu, plain_gelu, lambda: [normal(7, 33)])],
    "SwiGLU": [Operation(swiglu, plain_swiglu, lambda: [normal(7, 33), normal(7, 33, seed=1)])],
    "gradients": [gradient_operation()],
    "gather": [
        Operation(
            lambda x: mx.take(x, mx.array([4, 0, 4, 8]), axis=0),
            lambda x: mx.stack([x[4], x[0], x[4], x[8]]),
            lambda: [normal(9, 40)],
            tolerance=EXACT,
        )
    ],
    "slices": [
        Operation(
            write_in_the_middle,
            lambda x, new: mx.concatenate([x[:1], new[:1], x[2:3], new, x[5:], new]),
            lambda: [normal(9, 40), normal(2, 40, seed=1)],
            tolerance=EXACT,
        )
    ],
    "largest and sum": [
        Operation(
            lambda x: mx.concatenate([x.argmax(axis=-1), mx.cumsum(x[0] > 0)]),
            lambda x: mx.array(largest_and_sums(np.array(x))),
            lambda: [normal(5, 1025)],
            dtypes=INTEGERS,
            tolerance=EXACT,
        )
    ],
    "random numbers": [
        Operation(
            lambda x: drawn(7), lambda x: drawn(7), lambda: [normal(1)], INTEGERS, tolerance=EXACT
        )
    ],
    "quantization, affine": [
        quantization_operation("affine", bits, group, 1.6 / (2**bits - 1))
        for bits in AFFINE_BITS
        for group in AFFINE_GROUPS
    ],
    **{
        f"quantized product, affine, {bits} bits": [
            operation
            for group in AFFINE_GROUPS
            for operation in quantized_operations("affine", bits, group)
        ]
        for bits in AFFINE_BITS
    },
    **{
        f"quantization, {form[0]}": [quantization_operation(*form, step)]
        for form, step in FLOAT_MODES.items()
    },
    **{f"quantized product, {form[0]}": quantized_operations(*form) for form in FLOAT_MODES},
}
