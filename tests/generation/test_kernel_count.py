"""The kernels that a GPU launches for each layer of a token are counted, and do not grow."""

import os
from functools import partial

import pytest
from fixtures.loaded_models import tiny
from fixtures.tiny import Bits, Recipe

from benchmarks.kernel_count import count_batch_kernels, count_kernels, kernels_per_layer
from internvl3_mlx import load

pytestmark = pytest.mark.skipif(
    os.environ.get("PRETEND_GPU") == "noisy", reason="the noise is made by operations of its own"
)
# Weights, compiled or not, with our kernels or not. Two norms, four products, bias, rotation,
# attention, two sums, SwiGLU, and one write or two; a dense product adds the bias itself. Ours are
# one kernel each for a sum and the norm after it, and, of one write, for the bias and the rotation.
MOST = {
    ("4 bits", True, False): 13, ("4 bits", False, False): 14,
    ("dense", True, False): 12, ("dense", False, False): 13,
    ("4 bits", True, True): 11, ("4 bits", False, True): 13,
    ("dense", True, True): 11, ("dense", False, True): 12,
}  # fmt: skip


@pytest.mark.parametrize(("weights", "compiled", "own"), MOST)
def test_no_layer_launches_more_kernels_than_it_needs(weights, compiled, own):
    bits = Bits() if weights == "4 bits" else None
    model = load(str(tiny(Recipe(layout="mlx", bits=bits)).folder)).model
    count = partial(count_kernels, own=own)
    found = kernels_per_layer(model, compiled=compiled, count=count)
    assert found == MOST[weights, compiled, own]


def test_a_batch_launches_no_more_than_one_answer():
    """It makes masks, and where tokens are written, once for all layers, and copies no keys."""
    model = load(str(tiny(Recipe(layout="mlx", bits=Bits())).folder)).model
    most = MOST["4 bits", True, False]
    assert kernels_per_layer(model, compiled=True, count=count_batch_kernels) == most
