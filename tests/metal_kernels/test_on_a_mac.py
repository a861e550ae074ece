"""The same kernels on a real GPU."""

import pytest

from internvl3_mlx.metal_kernels import dispatch, self_test
from internvl3_mlx.metal_kernels.variants import all_variants


@pytest.mark.metal
@pytest.mark.skipif(not dispatch.metal_available(), reason="MLX finds no Metal here")
@pytest.mark.parametrize("variant", all_variants(), ids=lambda variant: variant.name)
def test_kernels_on_the_gpu_equal_their_references(variant):
    state = self_test.run_self_test(variant)
    assert state.passed, state.detail
