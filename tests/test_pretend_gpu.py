"""The stand-in for a GPU says and does what tests/pretend_gpu promises, in child processes, too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "pretend_gpu"
ROOT = FOLDER.parents[1]
PROGRAM = """
import mlx.core as mx, mlx.nn as nn
from internvl3_mlx.cli.system_info import device_info
from internvl3_mlx.device import gpu_memory_limit, on_gpu
from internvl3_mlx.metal_kernels import dispatch
exact = nn.Linear(8, 8)
x = mx.ones((3, 8))
noise = mx.abs(exact(x) - mx.addmm(exact.bias, x, exact.weight.T)).max().item()
turned = mx.fast.rope(mx.ones((1, 1, 1, 8)), 8, traditional=False, base=1e6, scale=1.0,
                      offset=32000)[0, 0, 0, 0]
fast = abs(turned - (mx.cos(mx.array(32000.0)) - mx.sin(mx.array(32000.0)))).item()
print(on_gpu(), mx.metal.is_available(), dispatch.metal_available(), gpu_memory_limit(),
      device_info()["device_name"], 0 < noise < 1e-4, 1e-4 < fast < 1e-1, sep="|")
"""


def run(mode):
    environment = {
        **os.environ,
        "PRETEND_GPU": mode,
        "PYTHONPATH": os.pathsep.join([str(FOLDER), str(ROOT)]),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip().split("|")


@pytest.mark.parametrize("mode", ["1", "noisy"])
def test_mlx_says_that_it_has_a_gpu_and_our_kernels_see_none(mode):
    noisy = str(mode == "noisy")
    name, memory = "Apple M1, pretended", str(12 * 2**30)
    assert run(mode) == ["True", "True", "False", memory, name, noisy, noisy]


def test_a_child_in_another_folder_pretends_although_the_path_was_relative():
    ask = "import os; print(os.environ['PYTHONPATH'].split(os.pathsep)[0])"
    environment = {**os.environ, "PRETEND_GPU": "1", "PYTHONPATH": "tests/pretend_gpu"}
    done = subprocess.run(
        [sys.executable, "-c", ask], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(FOLDER)


def test_the_subset_of_continuous_integration_exists():
    files = (FOLDER / "subset.txt").read_text().splitlines()
    assert len(files) == len({*files}) > 5
    assert all((ROOT / file).is_file() for file in files)
    assert "@tests/pretend_gpu/subset.txt" in (ROOT / ".ci" / "run").read_text()
