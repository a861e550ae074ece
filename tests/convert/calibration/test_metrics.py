"""Questions, what the 16-bit model answers, and how far a packed one lies from it."""

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


def test_a_sample_is_a_question_with_the_models_own_answer(opened, samples):
    for sample in samples:
        assert opened.tokenizer.image_id not in sample.ids[sample.first_scored :]
        assert sample.ids[sample.first_scored - 1] == opened.tokenizer.image_id
        assert sample.tiles.dtype == np.uint8
        best = answer_log_probs(opened.model, sample).argmax(-1).tolist()
        answer = sample.ids.index(opened.tokenizer.added["<|im_end|>"].id)
        tail = sample.ids[-4:]
        assert best[-4:] == tail
        assert answer < len(sample.ids) - 4


def test_questions_may_come_with_the_pictures(opened, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "asked")
    line = '{"image": "2.png", "question": "Read the text."}\n'
    (tmp_path / "asked" / "q.jsonl").write_text(line)
    [sample] = load_samples(tmp_path / "asked", opened)
    assert "Read the text." in opened.tokenizer.decode(sample.token_ids)


@pytest.mark.parametrize("line", ["{", '{"image": "2.png"}', "[1]", '"x"'])
def test_a_line_that_is_no_question_is_named(opened, tmp_path, line):
    (tmp_path / "q.jsonl").write_text(line)
    with pytest.raises(
        UserError, match=r"q\.jsonl:1: wanted \{\"image\": …, \"question\": …\}, not"
    ):
        load_samples(tmp_path, opened)


def test_a_folder_without_pictures_is_refused(opened, tmp_path):
    with pytest.raises(UserError, match="no pictures in"):
        load_samples(tmp_path, opened)
    with pytest.raises(UserError, match="no folder"):
        load_samples(tmp_path / "gone", opened)


def test_samples_to_measure_on_are_never_learned_from(samples):
    many = [*samples] * 4
    learning, kept = split_samples(list(range(len(many))))
    assert sorted([*learning, *kept]) == list(range(len(many)))
    assert len(kept) == len(many) // 4


def test_divergence_is_zero_only_for_equal_rows():
    rows = log_softmax(mx.random.normal((3, 7)))
    assert kl_divergence(rows, rows).abs().max().item() == 0
    assert (kl_divergence(rows, log_softmax(mx.zeros((3, 7)))) > 0).all().item()


def test_a_model_agrees_with_itself(opened, samples):
    figures = compute_metrics(opened.model, samples, reference_log_probs(opened.model, samples))
    assert figures.kl == pytest.approx(0, abs=1e-5)
    assert figures.top1 == 1
    assert figures.perplexity == pytest.approx(figures.reference_perplexity, rel=1e-3)
    assert figures.tokens == sum(len(s.ids) - s.first_scored - 1 for s in samples)


def test_sensitivity_is_the_kl_of_packing_that_unit_alone(opened, samples):
    few = samples[:2]
    before = reference_log_probs(opened.model, few)
    entries = [
        entry
        for entry in measure_sensitivities(opened.model, few, vision_bits=8)
        if (entry.quantization.bits, entry.quantization.group_size) == (8, 32)
        or entry.quantization.bits == 3
    ]
    wanted = {
        "language_model.model.layers.1.mlp.down_proj",
        "language_model.model.embed_tokens",
        "vision_model.encoder.layers.0.attn.qkv",
        "mlp1.1",
        "language_model.lm_head",
    }
    assert wanted <= {entry.modules[0] for entry in entries}
    for entry in entries:
        if entry.modules[0] in wanted and entry.quantization.group_size == 32:
            assert entry.kl == pytest.approx(
                kl_alone(opened, few, before, entry), rel=0.05, abs=1e-5
            )


def kl_alone(opened, samples, before, entry):
    form = entry.quantization
    modules = [get_module(opened.model, path) for path in entry.modules]
    weights = [module.weight for module in modules]
    for module in modules:
        parts = mx.quantize(module.weight, group_size=form.group_size, bits=form.bits)
        module.weight = mx.dequantize(*parts, group_size=form.group_size, bits=form.bits)
    figures = compute_metrics(opened.model, samples, before)
    for module, weight in zip(modules, weights, strict=True):
        module.weight = weight
    return figures.kl


def test_measuring_leaves_the_model_as_it_was(opened, samples):
    before = answer_log_probs(opened.model, samples[0])
    list(measure_sensitivities(opened.model, samples[:1]))
    assert mx.array_equal(answer_log_probs(opened.model, samples[0]), before)
