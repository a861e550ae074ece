"""Calibration samples, and the metrics of a quantized model against its 16-bit source."""

import shutil

import mlx.core as mx
import numpy as np
import pytest
from fixtures.tiny import Recipe

from internvl3_mlx.convert.calibration.bit_allocation import get_module, measure_sensitivities
from internvl3_mlx.convert.calibration.data import load_samples, split_samples
from internvl3_mlx.convert.calibration.metrics import (
    answer_log_probs,
    compute_metrics,
    kl_divergence,
    log_softmax,
    reference_log_probs,
)
from internvl3_mlx.errors import UserError

TINY = Recipe(style="300m")


def test_a_sample_is_a_question_with_the_models_own_answer(loaded, samples):
    for sample in samples:
        assert loaded.tokenizer.image_id not in sample.token_ids[sample.first_scored :]
        assert sample.token_ids[sample.first_scored - 1] == loaded.tokenizer.image_id
        assert sample.tiles.dtype == np.uint8
        best = answer_log_probs(loaded.model, sample).argmax(-1).tolist()
        answer = sample.token_ids.index(loaded.tokenizer.added["<|im_end|>"].id)
        tail = sample.token_ids[-4:]
        assert best[-4:] == tail
        assert answer < len(sample.token_ids) - 4


def test_a_folder_may_bring_its_own_questions(loaded, images, tmp_path):
    shutil.copytree(images, tmp_path / "asked")
    line = '{"image": "2.png", "question": "Read the text."}\n'
    (tmp_path / "asked" / "q.jsonl").write_text(line)
    [sample] = load_samples(tmp_path / "asked", loaded)
    assert "Read the text." in loaded.tokenizer.decode(sample.token_ids)


@pytest.mark.parametrize("line", ["{", '{"image": "2.png"}', "[1]", '"x"'])
def test_a_line_that_is_not_a_question_is_named(loaded, tmp_path, line):
    (tmp_path / "q.jsonl").write_text(line)
    with pytest.raises(UserError, match=r"q\.jsonl:1: .* is not a question; write "):
        load_samples(tmp_path, loaded)


def test_a_folder_without_pictures_is_refused(loaded, tmp_path):
    with pytest.raises(UserError, match="there are no images in"):
        load_samples(tmp_path, loaded)
    with pytest.raises(UserError, match="there is no folder"):
        load_samples(tmp_path / "gone", loaded)


def test_held_out_samples_are_not_calibrated_on(samples):
    many = [*samples] * 4
    calibration, held_out = split_samples(list(range(len(many))))
    assert sorted([*calibration, *held_out]) == list(range(len(many)))
    assert len(held_out) == len(many) // 4


def test_kl_divergence_is_zero_only_for_equal_rows():
    rows = log_softmax(mx.random.normal((3, 7)))
    assert kl_divergence(rows, rows).abs().max().item() == 0
    assert (kl_divergence(rows, log_softmax(mx.zeros((3, 7)))) > 0).all().item()


def test_a_model_agrees_with_itself(loaded, samples):
    metrics = compute_metrics(loaded.model, samples, reference_log_probs(loaded.model, samples))
    assert metrics.kl == pytest.approx(0, abs=1e-5)
    assert metrics.top1 == 1
    assert metrics.perplexity == pytest.approx(metrics.reference_perplexity, rel=1e-3)
    assert metrics.tokens == sum(len(s.token_ids) - s.first_scored - 1 for s in samples)


def test_sensitivity_is_the_kl_of_quantizing_that_unit_alone(loaded, samples):
    few = samples[:2]
    before = reference_log_probs(loaded.model, few)
    entries = [
        entry
        for entry in measure_sensitivities(loaded.model, few, vision_bits=8)
        if (entry.quantization.bits, entry.quantization.group_size) == (8, 32)
        or entry.quantization.bits == 3
    ]
    expected = {
        "language_model.model.layers.1.mlp.down_proj",
        "language_model.model.embed_tokens",
        "vision_model.encoder.layers.0.attn.qkv",
        "mlp1.1",
        "language_model.lm_head",
    }
    assert expected <= {entry.modules[0] for entry in entries}
    for entry in entries:
        if entry.modules[0] in expected and entry.quantization.group_size == 32:
            assert entry.kl == pytest.approx(
                kl_alone(loaded, few, before, entry), rel=0.05, abs=1e-5
            )


def kl_alone(loaded, samples, before, entry):
    quantization = entry.quantization
    modules = [get_module(loaded.model, path) for path in entry.modules]
    weights = [module.weight for module in modules]
    for module in modules:
        parts = mx.quantize(
            module.weight, group_size=quantization.group_size, bits=quantization.bits
        )
        module.weight = mx.dequantize(
            *parts, group_size=quantization.group_size, bits=quantization.bits
        )
    metrics = compute_metrics(loaded.model, samples, before)
    for module, weight in zip(modules, weights, strict=True):
        module.weight = weight
    return metrics.kl


def test_measuring_leaves_the_model_as_it_was(loaded, samples):
    before = answer_log_probs(loaded.model, samples[0])
    list(measure_sensitivities(loaded.model, samples[:1]))
    assert mx.array_equal(answer_log_probs(loaded.model, samples[0]), before)
