"""The kernels that a GPU launches for each layer of a token are counted, and do not grow."""

import os

import pytest
from fixtures.loaded_models import tiny
from fixtures.tiny import Bits, Recipe

from benchmarks.kernel_count import count_batch_kernels, kernels_per_layer
from internvl3_mlx import load

# Two norms, four products, bias, rotation, attention, two sums, SwiGLU, and one write or two; a
# dense product adds the bias itself.
MOST = {("4 bits", True): 13, ("4 bits", False): 14, ("dense", True): 12, ("dense", False): 13}


@pytest.mark.skipif(
    os.environ.get("PRETEND_GPU") == "noisy", reason="the noise is made by operations of its own"
)
@pytest.mark.parametrize(("weights", "compiled"), MOST)
def test_no_layer_launches_more_kernels_than_it_needs(weights, compiled):
    bits = Bits() if weights == "4 bits" else None
    model = load(str(tiny(Recipe(layout="mlx", bits=bits)).folder)).model
    assert kernels_per_layer(model, compiled=compiled) == MOST[weights, compiled]


def test_a_batch_launches_no_more_than_one_answer():
    """It makes masks, and where tokens are written, once for all layers, and copies no keys."""
    model = load(str(tiny(Recipe(layout="mlx", bits=Bits())).folder)).model
    most = MOST["4 bits", True]
    assert kernels_per_layer(model, compiled=True, count=count_batch_kernels) == most
