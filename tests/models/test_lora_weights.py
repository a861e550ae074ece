"""A concatenated adapter does to fused rows what each adapter did to its own."""

import mlx.core as mx
import numpy as np
import pytest
from fixtures.inputs import relative_error
from fixtures.loaded_models import numbers

from internvl3_mlx import KeyMapError
from internvl3_mlx.models.lora import LoRAWeights, concatenate_lora, row_norms

WIDTH = 7


def drawn(rows, rank=3, scale=2.0, *, dora=False, seed=0):
    keys = mx.random.split(mx.random.key(seed), 3)
    down = mx.random.normal((rank, WIDTH), key=keys[0])
    up = mx.random.normal((rows, rank), key=keys[1])
    magnitude = 1 + mx.random.uniform(shape=(rows,), key=keys[2]) if dora else None
    return LoRAWeights(down, up, scale, magnitude)


def weight(rows, seed=9):
    return mx.random.normal((rows, WIDTH), key=mx.random.key(seed))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("scales", [(2.0, 2.0), (2.0, 0.5)], ids=str)
def test_adapters_of_one_matrix_become_blocks(dora, scales):
    first = drawn(4, 3, scales[0], dora=dora, seed=1)
    last = drawn(6, 2, scales[1], dora=dora, seed=2)
    rows = [weight(4, 3), weight(5, 4), weight(6, 5)]
    whole = concatenate_lora([(first, 0, 4), (None, 0, 5), (last, 0, 6)])
    assert whole.shape == (15, WIDTH)
    assert whole.lora_a.shape[0] == 3 + 2
    expected = mx.concatenate([first.merged_into(rows[0]), rows[1], last.merged_into(rows[2])])
    assert (
        relative_error(numbers(whole.merged_into(mx.concatenate(rows))), numbers(expected)) < 1e-6
    )


def test_a_shared_a_is_stored_once_and_unchanged():
    whole = drawn(6, dora=True)
    equal = LoRAWeights(
        mx.array(np.array(whole.lora_a)), whole.lora_b, whole.scale, whole.magnitude
    )
    again = concatenate_lora([(whole, 0, 2), (equal, 2, 3), (whole, 3, 6)])
    assert again.scale == whole.scale
    for ours, theirs in ((again.lora_a, whole.lora_a), (again.lora_b, whole.lora_b)):
        assert bool(mx.array_equal(ours, theirs))
    assert bool(mx.array_equal(again.magnitude, whole.magnitude))


def test_a_slice_of_rows_merges_like_the_whole():
    factors, rows = drawn(8, dora=True), weight(8)
    some = factors.slice_rows(2, 5).merged_into(rows[2:5])
    assert relative_error(numbers(some), numbers(factors.merged_into(rows)[2:5])) < 1e-6


def test_a_row_with_nan_magnitude_keeps_the_norm_of_the_weight():
    factors, rows = drawn(4, dora=True), weight(4)
    open_rows = mx.where(mx.arange(4) == 2, mx.nan, factors.magnitude)
    out = LoRAWeights(factors.lora_a, factors.lora_b, factors.scale, open_rows).merged_into(rows)
    assert row_norms(out)[2].item() == pytest.approx(row_norms(rows)[2].item(), rel=1e-6)
    assert row_norms(out)[1].item() == pytest.approx(factors.magnitude[1].item(), rel=1e-6)


def test_lora_and_dora_cannot_be_concatenated():
    with pytest.raises(
        KeyMapError,
        match="cannot share one fused weight; merge one",
    ):
        concatenate_lora([(drawn(4, dora=True), 0, 4), (drawn(4, seed=1), 0, 4)])
