"""The self-test is tested: it must reject a kernel that any rule of breaking one made wrong.

Twenty mutants run with the suite; with INTERNVL3_ALL_MUTANTS=1 all of them do.
"""

import os

import mlx.core as mx
import numpy as np
import pytest
from fixtures.attention_cases import Ragged
from fixtures.kernel_mutants import kernel_mutants, sample_mutants
from metal_emulator import KernelRefused

from internvl3_mlx.metal_kernels import dispatch, registry, self_test
from internvl3_mlx.metal_kernels.flash_decode import (
    FlashVariant,
    attend_fastest,
    attend_mlx,
    flash_decode_kernel,
)

HALF = mx.bfloat16
# few rows, one tile, several tiles; the files whose text each runs
VARIANTS = {
    FlashVariant(HALF, 4, 32, 32, 3): ("flash_rows", "kv_store", "flash_join"),
    FlashVariant(HALF, 8, 64, 64, 7): ("flash_tiles", "tile", "kv_store"),
    FlashVariant(HALF, 4, 64, 32, 5, 3, causal=True): ("flash_tiles", "tile"),
}
UNWATCHED = {"schedules": ("forward",), "checked": False, "strict": False}
ALL = "INTERNVL3_ALL_MUTANTS"
SAMPLES = (7, 7, 6)  # of each variant
REFUSED_AT_LEAST = 12  # the rest computes the same


def test_a_broken_kernel_is_refused_in_one_line_and_the_answer_is_right(
    emulated, a_mac, monkeypatch
):
    """Twenty, by many rules, under ``force``; a mutant that computes the same may run."""
    monkeypatch.setenv(dispatch.MODE_VARIABLE, "force")
    refused = 0
    for seed, (variant, names) in enumerate(VARIANTS.items()):
        shape = Ragged(
            (300,), variant.rows, variant.head_dim, variant.bits, variant.group_size,
            variant.draft, variant.causal,
        )  # fmt: skip
        q, store = shape.made(variant.dtype)
        store, length = store.first_tokens(300), 300
        expected = attend_mlx(q, store, length, causal=variant.causal)
        for mutant in sample_mutants(SAMPLES[seed], *names, seed=seed):
            self_test.results.clear()
            registry.write_record(registry.SELF_TESTS_FILE, {})
            lines: list[str] = []
            dispatch.set_fallback_handler(lines.append)
            with emulated(mutate=[mutant.change], **UNWATCHED):
                found = attend_fastest(q, store, length, causal=variant.causal)
            error = self_test.max_relative_error(found, expected.astype(mx.float32))
            assert error <= 2 * self_test.TOLERANCES[variant.dtype], mutant
            assert len(lines) == (not self_test.get_result(variant).passed), mutant
            if lines:
                assert mx.array_equal(found, expected)
                assert "falling back to MLX's own attention" in lines[0]
                assert "\n" not in lines[0]
            refused += len(lines)
    assert refused >= REFUSED_AT_LEAST
    dispatch.set_fallback_handler()


def used_error(variant: FlashVariant) -> float:
    """Return the error of an answer at 1,000 tokens, largest of any row, against float64."""
    shape = Ragged(
        (1000, 457), variant.rows, variant.head_dim, variant.bits, variant.group_size,
        variant.draft, variant.causal, kv_heads=3,
    )  # fmt: skip
    q, store = shape.made(variant.dtype)
    wanted, sums = shape.exact(q, store)
    found, lse = flash_decode_kernel(q, store, mx.array(shape.lengths), causal=variant.causal)
    out_error = self_test.max_relative_error(found, mx.array(wanted.astype(np.float32)))
    ratio = np.exp(np.array(lse) - sums.astype(np.float32))
    return max(out_error, float(np.abs(ratio - 1).max()))


@pytest.mark.slow
@pytest.mark.skipif(ALL not in os.environ, reason=f"set {ALL}=1")
@pytest.mark.parametrize(
    ("variant", "mutant"),
    [
        pytest.param(variant, mutant, id=f"{variant.rows}x{variant.draft}-{mutant}")
        for variant, names in VARIANTS.items()
        for mutant in kernel_mutants(*names)
        if ALL in os.environ  # or pytest would skip five hundred tests, one by one
    ],
)
def test_what_changes_an_answer_is_rejected(emulated, variant, mutant):
    """All mutants; several hundred seconds."""
    tolerance = self_test.TOLERANCES[variant.dtype]
    try:
        with emulated(mutate=[mutant.change], **UNWATCHED):
            if used_error(variant) <= tolerance:
                return
            error = self_test.largest_error(variant)
    except KernelRefused:
        return  # as a Mac's compiler would
    assert not error <= tolerance
