"""Bits go where they matter, scales are learned, and what it brings is measured."""

import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from fixtures.converting import converted, logits, tensors
from fixtures.inputs import picture
from fixtures.opened import tiny
from fixtures.tiny import Recipe

from internvl3_mlx.config import Quantization
from internvl3_mlx.convert.calibrate import allocate, hull
from internvl3_mlx.convert.learn import Learned, learn, learned_tensors
from internvl3_mlx.convert.measure import (
    bits_by_part,
    compare,
    divergence,
    log_probs,
    normalized,
    reference,
)
from internvl3_mlx.convert.opened import open_model
from internvl3_mlx.convert.quality import Wish, calibrate, measure, prove_forward
from internvl3_mlx.convert.quantize import recipe
from internvl3_mlx.convert.samples import Sample, read_samples, split
from internvl3_mlx.convert.sensitivity import Measured, module_at, packed_bits, sensitivities
from internvl3_mlx.convert.smooth import smooth
from internvl3_mlx.errors import CheckpointError, UserError

TINY = Recipe(style="300m")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(4):
        picture(90 + 40 * number, 70, seed=number).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def opened():
    return open_model(tiny(TINY).folder)


@pytest.fixture(scope="module")
def samples(opened, pictures):
    return read_samples(pictures, opened)


@pytest.fixture(scope="module")
def found(pictures):
    silent = lambda *_: None  # noqa: E731
    return calibrate(tiny(TINY).folder, pictures, Wish(5.0, epochs=2), silent)


def test_a_sample_is_a_question_with_the_models_own_answer(opened, samples):
    for sample in samples:
        assert opened.tokenizer.image_id not in sample.ids[sample.scored :]
        assert sample.ids[sample.scored - 1] == opened.tokenizer.image_id
        assert sample.tiles.dtype == np.uint8
        best = log_probs(opened.model, sample).argmax(-1).tolist()
        answer = sample.ids.index(opened.tokenizer.added["<|im_end|>"].id)
        tail = sample.ids[-4:]
        assert best[-4:] == tail
        assert answer < len(sample.ids) - 4


def test_questions_may_come_with_the_pictures(opened, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "asked")
    line = '{"image": "2.png", "question": "Read the text."}\n'
    (tmp_path / "asked" / "q.jsonl").write_text(line)
    [sample] = read_samples(tmp_path / "asked", opened)
    assert "Read the text." in opened.tokenizer.decode(sample.ids)


@pytest.mark.parametrize("line", ["{", '{"image": "2.png"}', "[1]", '"x"'])
def test_a_line_that_is_no_question_is_named(opened, tmp_path, line):
    (tmp_path / "q.jsonl").write_text(line)
    with pytest.raises(
        UserError, match=r"q\.jsonl:1: wanted \{\"image\": …, \"question\": …\}, not"
    ):
        read_samples(tmp_path, opened)


def test_a_folder_without_pictures_is_refused(opened, tmp_path):
    with pytest.raises(UserError, match="no pictures in"):
        read_samples(tmp_path, opened)
    with pytest.raises(UserError, match="no folder"):
        read_samples(tmp_path / "gone", opened)


def test_samples_to_measure_on_are_never_learned_from(samples):
    many = [*samples] * 4
    learning, kept = split(list(range(len(many))))
    assert sorted([*learning, *kept]) == list(range(len(many)))
    assert len(kept) == len(many) // 4


def test_divergence_is_zero_only_for_equal_rows():
    rows = normalized(mx.random.normal((3, 7)))
    assert divergence(rows, rows).abs().max().item() == 0
    assert (divergence(rows, normalized(mx.zeros((3, 7)))) > 0).all().item()


def test_a_model_agrees_with_itself(opened, samples):
    figures = compare(opened.model, samples, reference(opened.model, samples))
    assert figures.kl == pytest.approx(0, abs=1e-5)
    assert figures.top1 == 1
    assert figures.perplexity == pytest.approx(figures.reference_perplexity, rel=1e-3)
    assert figures.tokens == sum(len(s.ids) - s.scored - 1 for s in samples)


def test_sensitivity_is_the_kl_of_packing_that_unit_alone(opened, samples):
    few = samples[:2]
    before = reference(opened.model, few)
    entries = [
        entry
        for entry in sensitivities(opened.model, few, tower_bits=8)
        if (entry.form.bits, entry.form.group_size) == (8, 32) or entry.form.bits == 3
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
        if entry.modules[0] in wanted and entry.form.group_size == 32:
            assert entry.kl == pytest.approx(
                kl_alone(opened, few, before, entry), rel=0.05, abs=1e-5
            )


def kl_alone(opened, samples, before, entry):
    form = entry.form
    modules = [module_at(opened.model, path) for path in entry.modules]
    weights = [module.weight for module in modules]
    for module in modules:
        parts = mx.quantize(module.weight, group_size=form.group_size, bits=form.bits)
        module.weight = mx.dequantize(*parts, group_size=form.group_size, bits=form.bits)
    figures = compare(opened.model, samples, before)
    for module, weight in zip(modules, weights, strict=True):
        module.weight = weight
    return figures.kl


def test_measuring_leaves_the_model_as_it_was(opened, samples):
    before = log_probs(opened.model, samples[0])
    list(sensitivities(opened.model, samples[:1]))
    assert mx.array_equal(log_probs(opened.model, samples[0]), before)


def entry(unit, bits, kl, width=64):
    form = Quantization(bits, 64)
    return Measured((unit,), form, packed_bits((10, width), form), kl)


def test_the_hull_drops_what_costs_more_for_less():
    entries = [entry("a", 2, 1.0), entry("a", 3, 0.9), entry("a", 4, 0.1), entry("a", 5, 0.2)]
    assert [e.form.bits for e in hull(entries)] == [2, 4]


def test_bits_go_to_the_unit_that_needs_them():
    entries = [
        entry(unit, bits, weight / 2**bits)
        for unit, weight in (("a", 100), ("b", 1))
        for bits in (2, 3, 4, 5, 6, 8)
    ]
    plan = allocate(entries, {"a": 640, "b": 640}, 4.5)
    assert plan.chosen[("a",)].form.bits > plan.chosen[("b",)].form.bits
    assert plan.bpw <= 4.5


def test_the_projector_takes_its_best_eight_bits_and_does_not_count():
    entries = [entry("a", 2, 1.0), entry("a", 4, 0.1), entry("mlp1.1", 8, 0.01)]
    plan = allocate(entries, {"a": 640, "mlp1.1": 640}, 4.5)
    assert plan.chosen[("mlp1.1",)].form.bits == 8
    assert plan.chosen[("a",)].form.bits == 4


def test_a_target_below_the_least_is_refused():
    with pytest.raises(UserError, match="--target-bpw 2.1 cannot be met: the least is 2.50 bits"):
        allocate([entry("a", 2, 1.0)], {"a": 640}, 2.1)


def test_learning_lowers_the_divergence(samples, monkeypatch):
    monkeypatch.setattr("internvl3_mlx.convert.learn.LEARNING_RATE", 2e-3)
    opened = open_model(tiny(TINY).folder)
    wanted = reference(opened.model, samples)
    choose = recipe(3, 32).choose
    forms = {
        f"language_model.model.layers.{n}.mlp.{name}": choose("x")
        for n in range(3)
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    steps = list(learn(opened.model, samples, wanted, forms, epochs=12))
    assert steps[-1].kl < 0.8 * steps[0].kl
    assert steps[-1].number == steps[-1].total
    assert len(learned_tensors(opened.model, forms, mx.float32)) == 3 * len(forms)


def test_what_was_learned_is_what_is_written(tmp_path, found):
    source = tiny(TINY)
    outcome = converted(source.folder, tmp_path / "out", found.recipe, learned=found.learned)
    written = tensors(tmp_path / "out")
    for name, x in found.learned.items():
        assert mx.array_equal(written[name], x), name
    assert {form.bits for form in outcome.packed.values()} != {4}
    assert np.isfinite(logits(tmp_path / "out", source)).all()


def test_a_calibrated_model_beats_the_plain_one_of_its_size(tmp_path, found, pictures):
    source = tiny(TINY)
    converted(source.folder, tmp_path / "plain", recipe(4, 32))
    converted(source.folder, tmp_path / "ours", found.recipe, learned=found.learned)
    plain, ours = (measure(source.folder, tmp_path / n, pictures) for n in ("plain", "ours"))
    bits = [bits_by_part(tmp_path / n)["language model"] for n in ("plain", "ours")]
    assert bits[1] <= bits[0] + 0.05
    assert ours.kl < plain.kl / 1.5


def test_scales_of_sixteen_bits_are_learned_in_thirty_two(samples):
    opened = open_model(tiny(TINY).folder)
    wanted = reference(opened.model, samples)
    path, form = "language_model.model.layers.0.mlp.up_proj", Quantization(3, 32)
    weight = module_at(opened.model, path).weight.astype(mx.float16)
    packed = {path: mx.quantize(weight, group_size=32, bits=3)}
    steps = list(learn(opened.model, samples, wanted, {path: form}, epochs=2, packed=packed))
    assert all(np.isfinite(step.kl) for step in steps)
    learned = learned_tensors(opened.model, {path: form}, mx.float16)
    assert learned[f"{path}.scales"].dtype == mx.float16
    assert mx.isfinite(learned[f"{path}.scales"]).all().item()


def test_packed_and_dense_products_learn_the_same():
    layer, form = nn.Linear(64, 32), Quantization(4, 32)
    learned, x = Learned(layer, form), mx.random.normal((5, 64))

    def dense(stretch):
        learned.stretch = stretch
        return (learned(x) ** 2).sum()

    def packed(stretch):
        learned.stretch = stretch
        parts = (learned._words, learned.scales, learned.biases)
        y = mx.quantized_matmul(x, *parts, transpose=True, group_size=32, bits=4)
        return ((y + layer.bias) ** 2).sum()

    start = mx.zeros((32, 2))
    for one, other in zip(*(mx.value_and_grad(f)(start) for f in (dense, packed)), strict=True):
        assert mx.allclose(one, other, rtol=1e-4, atol=1e-4).item()


def test_scaling_changes_no_answer(samples):
    for style in ("300m", "6b", "9b"):
        opened = open_model(tiny(Recipe(style=style)).folder)
        wanted = reference(opened.model, samples) if style == "300m" else None
        row = mx.array([list(range(5, 40))])
        before = opened.model(row)
        done = list(smooth(opened.model, own_samples(opened, samples, style), tower=True))
        assert len(done) == opened.config.text.num_hidden_layers + len(
            opened.model.vision_model.encoder.layers
        )
        assert mx.abs(opened.model(row) - before).max() < 1e-4 * mx.abs(before).max()
        if wanted is not None:
            assert compare(opened.model, samples, wanted).kl == pytest.approx(0, abs=1e-5)


def own_samples(opened, samples, style):
    """Give samples whose tiles and ids fit another tiny model."""
    if style == "300m":
        return samples
    side, image = opened.config.force_image_size, opened.tokenizer.image_id
    tile = np.random.default_rng(1).integers(0, 256, size=(1, side, side, 3), dtype=np.uint8)
    return [Sample([image] * opened.config.num_image_token + [7, 8, 9, 10], tile, 1)]


def test_a_tower_that_shares_the_budget_is_packed_and_written_as_measured(tmp_path, pictures):
    source, silent = tiny(TINY), lambda *_: None
    wish = Wish(5.5, tower_bits=6, epochs=1)
    found = calibrate(source.folder, pictures, wish, silent)
    outcome = converted(source.folder, tmp_path / "out", found.recipe, learned=found.learned)
    tower = [form for path, form in outcome.packed.items() if path.startswith("vision_model.")]
    assert tower
    assert min(form.bits for form in tower) >= 6
    assert measure(source.folder, tmp_path / "out", pictures).kl < 0.05


def test_the_projector_of_a_calibrated_model_has_eight_bits(found):
    assert {found.recipe.choose(path).bits for path in ("mlp1.1", "mlp1.3")} == {8}


def test_the_tower_is_dense_unless_it_shares_the_budget(found):
    assert found.recipe.choose("vision_model.encoder.layers.0.attn.qkv") is None


def test_a_copy_that_answers_differently_is_noticed(tmp_path):
    converted(tiny(Recipe(seed=1)).folder, tmp_path / "other")
    with pytest.raises(CheckpointError, match="the converted model answers differently"):
        prove_forward(tiny(Recipe()).folder, tmp_path / "other", same=True)


def test_a_copy_too_large_for_memory_is_not_run(monkeypatch, tmp_path):
    monkeypatch.setattr("internvl3_mlx.convert.quality.MEMORY_SHARE", 1e-9)
    assert prove_forward(tiny(Recipe()).folder, tmp_path, same=True) is None


def test_a_true_copy_is_proven_by_running_it(tmp_path):
    outcome = converted(tiny(Recipe()).folder, tmp_path / "out", compare=True, dtype="bfloat16")
    assert outcome.forward.kl < 1e-3
