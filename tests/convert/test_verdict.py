"""A conversion says in words how good its result is, from documented thresholds."""

import math
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from fixtures.conversions import run_conversion
from fixtures.loaded_models import tiny
from fixtures.tiny import Bits, Recipe

from internvl3_mlx.checkpoints.build_model import assemble_model, build_model
from internvl3_mlx.convert.calibration.calibrate import compare_outputs, make_probe_sample
from internvl3_mlx.convert.calibration.metrics import (
    VERDICTS,
    QualityMetrics,
    answer_log_probs,
    describe_quality,
    judge,
)
from internvl3_mlx.convert.calibration.passage import passage_sample
from internvl3_mlx.convert.calibration.streaming import stream_log_probs
from internvl3_mlx.convert.independent_check import check_reading
from internvl3_mlx.convert.recipes import uniform_recipe
from internvl3_mlx.errors import CheckpointError

PACKED = Recipe(layout="mlx", bits=Bits(tower=True))
DOCS = Path(__file__).parents[2] / "docs" / "quantization.md"


def metrics(kl, top1):
    return QualityMetrics(kl, top1, 9.0, 8.0, 127)


@pytest.mark.parametrize(
    ("kl", "top1", "words"),
    [
        (0.0017, 0.955, "as good as before"),
        (0.023, 0.88, "noticeable"),
        (0.139, 0.74, "noticeable"),  # calibrated to 5 bits per weight
        (0.005, 0.69, "poor"),
        (0.296, 0.65, "poor"),
        (0.2, 0.95, "poor"),
        (0.41, 0.57, "ruined"),
        (math.nan, 0.0, "ruined"),
    ],
)
def test_both_thresholds_must_be_kept(kl, top1, words):
    assert judge(metrics(kl, top1)).words == words
    assert describe_quality(metrics(kl, top1)).startswith(words)


def test_the_thresholds_are_those_of_the_documentation():
    rows = re.findall(r"^\| ([a-z ]+) \| ([\d.]+) \| (\d+)% \|", DOCS.read_text(), re.MULTILINE)
    assert rows == [(v.words, f"{v.kl:g}", f"{v.top1:.0%}"[:-1]) for v in VERDICTS[:-1]]


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(style="9b", layout="hf_a"), Recipe(tied=True)])
def test_a_streamed_model_computes_what_the_whole_one_does(recipe):
    folder = tiny(recipe).folder
    whole = build_model(folder)
    samples = [make_probe_sample(whole), passage_sample(whole)]
    expected = [answer_log_probs(whole.model, sample) for sample in samples]
    ticks = []
    streamed = stream_log_probs(assemble_model(folder), samples, lambda: ticks.append(1))
    for one, other in zip(expected, streamed, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(ticks) >= whole.config.text.num_hidden_layers + 2


def test_a_streamed_quantized_model_is_dequantized_to_the_same_values():
    folder = tiny(PACKED).folder
    whole = build_model(folder)
    samples = [make_probe_sample(whole), passage_sample(whole)]
    streamed = stream_log_probs(assemble_model(folder), samples, lambda: None)
    for sample, found in zip(samples, streamed, strict=True):
        np.testing.assert_allclose(found, answer_log_probs(whole.model, sample), atol=1e-4)


def test_two_bits_ruin_a_model_and_a_copy_is_as_good_as_before(tmp_path):
    source = tiny(Recipe()).folder
    run_conversion(source, tmp_path / "copy")
    run_conversion(source, tmp_path / "two", uniform_recipe(2, 64))
    copy = compare_outputs(source, tmp_path / "copy", same=True)
    two = compare_outputs(source, tmp_path / "two", same=False)
    assert judge(copy.text).words == "as good as before"
    assert two.text.kl > copy.text.kl


def test_a_comparison_out_of_time_is_given_up(tmp_path):
    source = tiny(Recipe()).folder
    run_conversion(source, tmp_path / "copy")
    assert compare_outputs(source, tmp_path / "copy", same=True, seconds=0) is None


READABLE = [
    *(Recipe(style=style) for style in ("300m", "6b", "9b")),
    *(Recipe(layout=layout) for layout in ("hf_a", "hf_b", "mlx")),
    Recipe(style="9b", layout="hf_a"),
    Recipe(dtype="bfloat16", shards=2),
    Recipe(tied=True),
]


def our_reading(folder, dtype="float32"):
    loaded = build_model(folder, dtype=dtype)
    samples = [make_probe_sample(loaded), passage_sample(loaded)]
    return loaded, samples, [answer_log_probs(loaded.model, sample) for sample in samples]


@pytest.mark.parametrize("recipe", READABLE)
def test_our_reading_equals_that_of_transformers_in_every_layout_and_family(recipe):
    folder = tiny(recipe).folder
    loaded, samples, ours = our_reading(folder)
    assert check_reading(folder, samples, ours, loaded.tokenizer.image_id) < 1e-6


@pytest.mark.parametrize("part", ["text", "tower", "projector"])
def test_a_wrong_reading_of_any_part_cannot_prove_itself(part):
    folder = tiny(Recipe()).folder
    loaded, samples, _ = our_reading(folder)
    model = loaded.model
    if part == "text":
        layer = model.language_model.model.layers[1].mlp.down_proj
        layer.weight = layer.weight * -3
    elif part == "tower":
        tower = model.vision_model.encoder.layers[0]
        tower.ls1 = tower.ls1 * -20
    else:
        model.mlp1[1].weight = model.mlp1[1].weight[::-1] * 4
    wrong = [answer_log_probs(model, sample) for sample in samples]
    mx.eval(wrong)
    with pytest.raises(CheckpointError, match="differs from that of transformers"):
        check_reading(folder, samples, wrong, loaded.tokenizer.image_id)
