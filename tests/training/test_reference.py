"""The reference is the base model, computed once and found by content alone."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from fixtures.inputs import relative_error
from fixtures.loaded_models import bare_model, numbers
from fixtures.lora_models import stirred
from fixtures.tolerances import TOLERANCE
from fixtures.training_samples import answer_alone, expected_log_probs, make_pair

from internvl3_mlx.errors import TrainingError
from internvl3_mlx.training import reference as module
from internvl3_mlx.training.data.collate import collate_pairs
from internvl3_mlx.training.lora_setup import LoRAConfig, add_lora
from internvl3_mlx.training.objectives import target_log_probs
from internvl3_mlx.training.reference import ReferenceLogProbs, answer_keys, reference_log_probs
from internvl3_mlx.training.trainable import set_trainable


@pytest.fixture
def setup(tmp_path):
    """Open a reference on a base model, then add adapters and change them."""
    model, checkpoint = bare_model("300m")
    references = ReferenceLogProbs(model, tmp_path)
    pairs = [
        make_pair(checkpoint, (2,), seed=1, lengths=(5, 3)),
        make_pair(checkpoint, (1, 1), seed=2, lengths=(1, 6)),
    ]
    expected = [
        numbers(expected_log_probs(model, answer_alone(one, which)))
        for one in pairs
        for which in ("chosen", "rejected")
    ]
    add_lora(model, LoRAConfig(rank=3, dropout=0.4, keys=("language", "vision")))
    set_trainable(model, ("lora",))
    stirred(model, 1)
    model.train()
    return model, references, pairs, np.concatenate(expected)


def refuse(*_):
    raise AssertionError("computed again")


def test_the_reference_is_the_base_and_the_model_stays_in_training_mode(setup):
    model, _, pairs, expected = setup
    batch = collate_pairs(pairs)
    assert relative_error(numbers(reference_log_probs(model, batch, None)), expected) < TOLERANCE
    assert model.training
    moved = numbers(target_log_probs(model, batch, None))
    assert relative_error(moved, expected) > 1e-2


def test_another_run_finds_the_reference_in_any_batch(setup, monkeypatch):
    model, references, pairs, expected = setup
    first = numbers(references.get(collate_pairs(pairs), None))
    assert relative_error(first, expected) < TOLERANCE
    references.flush()
    base, _ = bare_model("300m")
    again = ReferenceLogProbs(base, references.folder.parent)
    monkeypatch.setattr(module, "reference_log_probs", refuse)
    reversed_pairs = numbers(again.get(collate_pairs(pairs[::-1]), None))
    split = len(pairs[0].chosen) + len(pairs[0].rejected)
    np.testing.assert_array_equal(reversed_pairs, np.concatenate([first[split:], first[:split]]))


def test_references_by_another_attention_are_not_found(setup, monkeypatch):
    _, references, _, _ = setup
    base, _ = bare_model("300m")
    assert ReferenceLogProbs(base, references.folder.parent).folder == references.folder
    monkeypatch.setattr(module, "NUMERICS", "another")
    assert ReferenceLogProbs(base, references.folder.parent).folder != references.folder


def test_other_tokens_positions_or_images_have_other_keys(setup):
    _, _, pairs, _ = setup
    one, image_id = pairs[0], bare_model("300m")[0].image_id
    keys = answer_keys(collate_pairs([one]), image_id)
    prompt = one.prompt
    ids, tiles = prompt.input_ids.copy(), prompt.images[0].tiles.copy()
    ids[0], tiles[0, 0, 0, 0] = ids[0] - 1, tiles[0, 0, 0, 0] ^ 1
    others = [
        replace(one, prompt=replace(prompt, input_ids=ids)),
        replace(one, prompt=replace(prompt, positions=prompt.positions / 2)),
        replace(one, prompt=replace(prompt, images=(replace(prompt.images[0], tiles=tiles),))),
        replace(one, chosen=one.chosen[::-1].copy(), rejected=one.rejected[:-1]),
    ]
    found = [key for other in others for key in answer_keys(collate_pairs([other]), image_id)]
    assert len({*keys, *found}) == 2 + 2 * len(others)
    second = answer_keys(collate_pairs([pairs[1], one]), image_id)  # wherever it is in a batch
    assert second[2:] == keys


def test_other_weights_or_another_dtype_use_another_folder(setup, tmp_path):
    _, references, _, _ = setup
    same, other, narrow = (bare_model("300m", seed=seed)[0] for seed in (0, 1, 0))
    narrow.set_dtype(mx.bfloat16)
    wide, _ = bare_model("300m")
    wide.update(narrow.parameters())
    wide.set_dtype(mx.float32)  # the same numbers in another compute dtype
    assert ReferenceLogProbs(same, tmp_path).folder == references.folder
    folders = [ReferenceLogProbs(model, tmp_path).folder for model in (same, other, narrow, wide)]
    assert len(set(folders)) == 4


def test_a_damaged_file_is_computed_again(setup):
    _, references, pairs, expected = setup
    references.get(collate_pairs(pairs), None)
    references.flush()
    (path,) = references.folder.iterdir()
    path.write_bytes(path.read_bytes()[:40])
    base, _ = bare_model("300m")
    again = ReferenceLogProbs(base, references.folder.parent)
    assert relative_error(numbers(again.get(collate_pairs(pairs), None)), expected) < TOLERANCE


def test_nothing_is_computed_after_training_began(setup):
    _, references, pairs, _ = setup
    references.get(collate_pairs(pairs[:1]), None)
    references.freeze()
    assert [path.suffix for path in references.folder.iterdir()] == [".safetensors"]
    assert references.get(collate_pairs(pairs[:1]), None).shape == (8,)
    with pytest.raises(TrainingError, match=r"rows.jsonl:3: no reference was computed"):
        references.get(collate_pairs(pairs[1:]), None)


def test_a_full_disk_is_reported(setup, monkeypatch):
    _, references, pairs, _ = setup
    references.get(collate_pairs(pairs), None)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(TrainingError, match="cannot cache the reference in .*No space left"):
        references.flush()
    assert not list(references.folder.iterdir())
