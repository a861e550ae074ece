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
SPLITS = 2  # so that simdgroups take several blocks

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
ALONE = "simdgroup_barrier(mem_flags::mem_threadgroup);"
END = ("metal::min(length, begin + share)", "begin + share")
EXISTING = ("FULL ? token : metal::min(token, live - 1)", "token")

FLASH = [
    # few rows
    (FEW, *END),
    (FEW, "key_row(own, metal::min(token, live - 1))", "key_row(own, token)"),
    (FEW, "metal::min(i * ACROSS + slot, live - 1)", "i * ACROSS + slot"),
    (FEW, "metal::min(BLOCK, part.y - base)", "BLOCK"),
    (FEW, "token < seen ? dot : LOWEST", "token < live ? dot : LOWEST"),
    (FEW, "scores[m][i] == LOWEST ? 0.0f : ", ""),
    (FEW, "total[m] *= fade;", ""),
    (FEW, "biases[m] *= fade;", ""),
    (FEW, "o[m][j] *= fade;", ""),
    (FEW, "if (slot == 0) outs", "outs"),
    (FEW, "if (lane == 0) {\n        tops", "{\n        tops"),
    (FEW, BARRIER, ""),
    (FEW, f"{ALONE}\n      Staged", "Staged"),
    (FEW, f"lane);\n      {ALONE}", "lane);"),
    (FEW, f"{ALONE}\n    UNROLLED", "UNROLLED"),
    (FEW, "if (i % D == 0) {", "{"),
    # one tile
    (TILE, *END),
    (TILE, *EXISTING),
    (TILE, "if (live == BLOCK) {", "if (live > 1) {"),
    (TILE, "if (first + e < rows) x", "x"),
    (TILE, "if (first_column) {\n        tops", "{\n        tops"),
    (TILE, f"{ALONE}\n        Staged", "Staged"),
    (TILE, f"lane);\n        {ALONE}", "lane);"),
    (TILE, f"{ALONE}\n      tile.write", "tile.write"),
    (TILE, f"{BARRIER}\n      size_t", "size_t"),
    (TILE, "highest = metal::max(highest, simd_shuffle_xor(highest, 1));", ""),
    (TILE, "highest = metal::max(highest, simd_shuffle_xor(highest, 8));", ""),
    (TILE, "x += simd_shuffle_xor(x, 1);", ""),
    (TILE, "x += simd_shuffle_xor(x, 4);", ""),
    (TILE, "row % 2 == 0 ? float2(one.x, next.x)", "true ? float2(one.x, next.x)"),
    (TILE, "sum *= fade;", ""),
    (TILE, "biases[g] *= fade;", ""),
    (TILE, "o[k] *= fade;", ""),
    (TILE, "- Store::OFFSET * scaled;", ";"),
    (TILE, "dots += part * (pair.x / Store::STEP)", "dots += part * pair.x"),
    # several tiles
    (TILES, "if (exists) row[dim]", "row[dim]"),
    (TILES, f"{BARRIER}\n        Staged", "Staged"),
    (TILES, f"lane);\n        {BARRIER}", "lane);"),
    (TILES, "if (exists && first_column) {\n        top[", "if (first_column) {\n        top["),
    (TILES, "if (exists && first_column) {\n        top[", "if (exists) {\n        top["),
    (TILES, "if (at < count) held[i]", "held[i]"),
    (LOUD, "if (at < count) to[at]", "to[at]"),
    (LOUD, "token < seen ? found.x : LOWEST", "found.x"),
    (LOUD, "token + 1 < seen ? found.y : LOWEST", "found.y"),
    (TILES, "token < seen ? metal::fast::exp", "true ? metal::fast::exp"),
    (TILES, "token + 1 < seen ? metal::fast::exp", "true ? metal::fast::exp"),
    (WHOLE, "if (!Store::SCALED) stage", "if (Store::SCALED) stage"),
    # joining
    (EMPTY, "total > 0.0f ? mixed[i] / total : 0.0f", "mixed[i] / total"),
    (EMPTY, "total > 0.0f ? highest + metal::log(total) : LOWEST", "highest + metal::log(total)"),
    (EMPTY, "if (lane == 0) lse", "lse"),
    (FEW, "highest = simd_max(highest);", ""),
]  # fmt: skip

PACKED = Projected(64, 4, 32)
PADDED = Projected(32, 8, 32, dtype=mx.float16)
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
    (PADDED, "row[Store::USED + lane] = 0", "word += 0"),
    (PADDED, "if (int(lane) < Store::WIDTH - Store::USED) row", "row"),
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
        out, lse = flash_decode_kernel(q, store, lengths, causal=shape.causal, splits=SPLITS)
        read = sum(metal.dispatches[0].reads[name].total for name in ("keys", "values"))
        return (
            relative_error(out, expected) <= ROUNDING[mx.float32] * shape.loud
            and np.allclose(np.array(lse), sums, rtol=1e-5, atol=1e-5 * shape.loud)
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
