"""Every barrier and every guard of the kernels, removed one by one: each must be detected.

Detected means that the emulator finds a fault, that the numbers are wrong, or that more bytes are
read than there need be.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from fixtures.attention_cases import ROUNDING, Ragged, relative_error
from fixtures.kv_append_cases import Projected
from metal_emulator import KernelFault, KernelRefused

from internvl3_mlx.metal_kernels.flash_decode import flash_decode_kernel
from internvl3_mlx.metal_kernels.kv_append import kv_append_kernel

FEW = Ragged((600, 2), 1, 64, 8, 64, draft=3, causal=True)  # one row of the second sees nothing
TILE = Ragged((600, 9), 7, 128, 8, 64)
TILES = Ragged((2, 70), 5, 64, 4, 32, draft=3, causal=True)
LOUD = Ragged(
    (9, 70), 5, 64, 4, 32, draft=7, causal=True, loud=99
)  # what is hidden would drown all
WHOLE = Ragged((33, 5), 5, 32, draft=2)
EMPTY = Ragged((0, 3), 3, 32, 4)

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
END = ("int end = metal::min(length, begin + share);", "int end = begin + share;")

FLASH = [
    # few rows
    (FEW, *END),
    (FEW, "if (int(lane) < live) {", "{"),
    (FEW, "if (token < live) Store::template", "Store::template"),
    (FEW, "if (token < live) {\n          const", "{\n          const"),
    (FEW, "token < metal::min(seen, live) ? dot : LOWEST", "token < live ? dot : LOWEST"),
    (FEW, "token < metal::min(seen, live) ? dot", "token < seen ? dot"),
    (FEW, "scores[m][i] == LOWEST ? 0.0f : ", ""),
    (FEW, "total[m] *= fade;", ""),
    (FEW, "o[m][j] *= fade;", ""),
    (FEW, "if (slot == 0) outs", "outs"),
    (FEW, "if (lane == 0) {\n        tops", "{\n        tops"),
    (FEW, BARRIER, ""),
    (FEW, "if (i % W == 0) {", "{"),
    # one tile
    (TILE, *END),
    (TILE, "values + at, metal::min(BLOCK, end - base)", "values + at, BLOCK"),
    (TILE, "if (live == BLOCK) {", "if (live > 1) {"),
    (TILE, "place < M ? scale", "true ? scale"),
    (TILE, "if (place < M && first_column) {\n        tops", "if (first_column) {\n        tops"),
    (TILE, "if (place < M && first_column) {\n        tops", "if (place < M) {\n        tops"),
    (TILE, f"if (start > 0) {BARRIER}", ""),
    (TILE, "if (place < M) tile.template write<WIDTH", "tile.template write<WIDTH"),
    (TILE, f"start);\n        {BARRIER}", "start);"),
    (TILE, "seen = metal::min(seen, live);", ""),
    (TILE, "if (int(column) < live) ", ""),
    (TILE, "if (int(column) + 1 < live) {", "{"),
    (TILE, "if (int(row) < live) {", "{"),
    (TILE, "lane < 8 * Store::GROUPS && int(token) < live", "int(token) < live"),
    (TILE, "lane < 8 * Store::GROUPS && int(token) < live", "lane < 8 * Store::GROUPS"),
    (TILE, "highest = metal::max(highest, simd_shuffle_xor(highest, 1));", ""),
    (TILE, "highest = metal::max(highest, simd_shuffle_xor(highest, 8));", ""),
    (TILE, "sum *= fade;", ""),
    (TILE, "o[k] *= fade;", ""),
    # several tiles
    (TILES, "int live = metal::min(BLOCK, end - base);", "int live = BLOCK;"),
    (TILES, f"{BARRIER}\n        const threadgroup", "const threadgroup"),
    (TILES, f"live, seen - base);\n        {BARRIER}", "live, seen - base);"),
    (TILES, "if (place < M) tile.template write<D / 4>", "tile.template write<D / 4>"),
    (TILES, "if (place < M && first_column) {\n        top[", "if (first_column) {\n        top["),
    (TILES, "if (place < M && first_column) {\n        top[", "if (place < M) {\n        top["),
    (LOUD, "token < seen ? scores[f].x : LOWEST", "scores[f].x"),
    (LOUD, "token + 1 < seen ? scores[f].y : LOWEST", "scores[f].y"),
    (TILES, "token < seen ? metal::exp", "true ? metal::exp"),
    (TILES, "token + 1 < seen ? metal::exp", "true ? metal::exp"),
    (WHOLE, "if (BITS == 16) pairs_of", "if (BITS == 8) pairs_of"),
    # joining
    (EMPTY, "total > 0.0f ? mixed[i] / total : 0.0f", "mixed[i] / total"),
    (EMPTY, "total > 0.0f ? highest + metal::log(total) : LOWEST", "highest + metal::log(total)"),
    (EMPTY, "if (lane == 0) lse", "lse"),
]  # fmt: skip

PACKED = Projected(64, 4, 32)
NEW_ROW = [
    (PACKED, "if (lane % SHARING == 0) row", "row"),
    (PACKED, "if (SHARING > 1) {", "if (false) {"),
    (PACKED, "if (lane % LANES == 0) {", "{"),
    (PACKED, "(x[i] - start) / step), 0.0f, LEVELS)", "(x[i] - start) / step), -9.0f, 2 * LEVELS)"),
    (PACKED, "metal::max((high - low) / LEVELS, LEAST)", "(high - low) / LEVELS"),
    (PACKED, "whole == 0.0f ? step : edge / whole", "edge / whole"),
    (PACKED, "(i + 1) * BITS % 32 == 0", "true"),
    (PACKED, "step < LANES;", "step < LANES / 2;"),
    (PACKED, "s < SHARING;", "s < SHARING / 2;"),
    (PACKED, "if (is_key) {", "if (true) {"),
]  # fmt: skip


def detected(emulated: Callable, change: tuple[str, str], right: Callable[..., bool]) -> bool:
    try:
        with emulated(schedules=("forward",), mutate=[change]) as metal:
            return not right(metal)
    except (KernelFault, KernelRefused):
        return True


@pytest.mark.parametrize(("shape", "old", "new"), FLASH, ids=lambda part: str(part)[:40])
def test_flash_decode_needs_each_barrier_and_guard(emulated, shape, old, new):
    q, store = shape.made()
    expected, sums = shape.exact(q, store)

    def right(metal) -> bool:
        lengths = mx.array(shape.lengths, mx.int32)
        out, lse = flash_decode_kernel(q, store, lengths, causal=shape.causal)
        read = sum(metal.dispatches[0].reads[name].total for name in ("keys", "values"))
        return (
            relative_error(out, expected) <= ROUNDING[mx.float32] * shape.loud
            and np.allclose(np.array(lse), sums, rtol=1e-5)
            and read == shape.fewest_bytes(store)
        )

    assert right_unchanged(emulated, right)
    assert detected(emulated, (old, new), right)


@pytest.mark.parametrize(("shape", "old", "new"), NEW_ROW, ids=lambda part: str(part)[:40])
def test_kv_append_needs_each_guard(emulated, shape, old, new):
    expected = shape.packed_by_mlx()

    def right(_) -> bool:
        found = kv_append_kernel(shape.keys, shape.values, shape.layout, shape.still)
        return mx.array_equal(found, expected).item()

    assert right_unchanged(emulated, right)
    assert detected(emulated, (old, new), right)


def right_unchanged(emulated: Callable, right: Callable[..., bool]) -> bool:
    with emulated(schedules=("forward",)) as metal:
        return right(metal)
