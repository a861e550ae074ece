"""The same kernels on the GPU they were written for."""

import pytest

from internvl3_mlx.metal_kernels import dispatch, self_test
from internvl3_mlx.metal_kernels.variants import all_variants


@pytest.mark.metal
@pytest.mark.skipif(not dispatch.metal_available(), reason="MLX finds no Metal here")
@pytest.mark.parametrize("variant", all_variants(), ids=lambda variant: variant.name)
def test_a_kernel_does_on_the_gpu_what_plain_operations_do(variant):
    state = self_test.run_self_test(variant)
    assert state.passed, state.detail
