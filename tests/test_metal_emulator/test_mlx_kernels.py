"""MLX's own kernels, unmodified, against float64: the emulator's anchor."""

import pytest
from test_metal_emulator.mlx_kernels import CASES, TOLERANCE


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_of_mlx_equals_float64_in_every_order_of_threads(name, dtype):
    case = CASES[name](dtype)
    runs = [case.run(schedule=schedule) for schedule in range(3)]
    assert [run.findings for run in runs] == [()] * 3
    assert case.error(runs[0]) < TOLERANCE[dtype]
    for run in runs[1:]:
        for index, values in run.outputs.items():
            assert values.tobytes() == runs[0].outputs[index].tobytes()
