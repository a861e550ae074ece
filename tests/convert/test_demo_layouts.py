"""The trained demo model keeps its answers in every layout."""

import json
from functools import cache
from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from fixtures.conversions import run_conversion
from fixtures.loaded_models import numbers

from internvl3_mlx import load
from internvl3_mlx.convert.recipes import uniform_recipe
from internvl3_mlx.loading.resolve import DEMO_FOLDER

LAYOUTS = ("mlx", "original", "hf")
SAMPLES = json.loads((DEMO_FOLDER / "samples" / "samples.json").read_text("utf-8"))


@cache
def demo():
    return load("demo")


def scores(folder):
    """Score every token of the first sample's prompt in float32, on every device: (L, V)."""
    sample = SAMPLES[0]
    inputs = demo().prepare_inputs(sample["question"], [DEMO_FOLDER / "samples" / sample["file"]])
    model = load(str(folder), dtype="float32").model
    return numbers(model(inputs.input_ids[None], inputs.pixel_values))[0]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The demo model once in each layout."""
    place = tmp_path_factory.mktemp("demo")
    for layout in LAYOUTS:
        run_conversion(DEMO_FOLDER, place / layout, layout=layout)
    return place


@pytest.mark.parametrize(("source", "target"), list(product(LAYOUTS, LAYOUTS)))
def test_the_demo_keeps_its_logits_through_every_pair(first, tmp_path, source, target):
    run_conversion(first / source, tmp_path / "out", layout=target)
    np.testing.assert_array_equal(scores(tmp_path / "out"), scores(DEMO_FOLDER))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_demo_answers_its_samples_in_every_layout(first, layout):
    vlm, config = load(str(first / layout)), demo().config
    own = {"system": config.system_message, "max_tiles": config.max_dynamic_patch}
    for sample in SAMPLES:  # a native config has no place for either
        picture = DEMO_FOLDER / "samples" / sample["file"]
        answer = vlm.ask(sample["question"], [picture], max_tokens=8, **own)
        assert answer.text == sample["answer"]


def test_dequantizing_the_8_bit_demo_keeps_its_logits(tmp_path):
    run_conversion(DEMO_FOLDER, tmp_path / "packed", uniform_recipe(8))
    run_conversion(tmp_path / "packed", tmp_path / "dense", dequantize=True, dtype="float32")
    packed, dense = scores(tmp_path / "packed"), scores(tmp_path / "dense")
    assert np.abs(packed - dense).max() < 1e-3 * np.abs(dense).max()
    assert mx.array_equal(mx.array(packed.argmax(-1)), mx.array(dense.argmax(-1)))
