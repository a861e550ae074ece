"""The reference: the base itself, computed once, found again by content alone."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from fixtures.inputs import relative_error
from fixtures.loaded_models import bare_model, numbers
from fixtures.lora_models import stirred
from fixtures.training_samples import answer_alone, expected_log_probs, make_pair

from internvl3_mlx.errors import TrainingError
from internvl3_mlx.training import reference as module
from internvl3_mlx.training.data.collate import collate_pairs
from internvl3_mlx.training.lora_setup import LoRAConfig, add_lora
from internvl3_mlx.training.objectives import target_log_probs
from internvl3_mlx.training.reference import ReferenceLogProbs, answer_keys, reference_log_probs
from internvl3_mlx.training.trainable import set_trainable


@pytest.fixture
def opened(tmp_path):
    """A model whose reference was opened on its base, then adapted and moved."""
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


def test_the_reference_is_the_base_and_training_goes_on_afterwards(opened):
    model, _, pairs, expected = opened
    batch = collate_pairs(pairs)
    assert relative_error(numbers(reference_log_probs(model, batch, None)), expected) < 2e-5
    assert model.training
    moved = numbers(target_log_probs(model, batch, None))
    assert relative_error(moved, expected) > 1e-2


def test_what_was_computed_is_found_by_another_run_in_any_batch(opened, monkeypatch):
    model, references, pairs, expected = opened
    first = numbers(references.of(collate_pairs(pairs), None))
    assert relative_error(first, expected) < 2e-5
    references.flush()
    base, _ = bare_model("300m")
    again = ReferenceLogProbs(base, references.folder.parent)
    monkeypatch.setattr(module, "reference_log_probs", refuse)
    turned = numbers(again.get(collate_pairs(pairs[::-1]), None))
    split = len(pairs[0].chosen) + len(pairs[0].rejected)
    np.testing.assert_array_equal(turned, np.concatenate([first[split:], first[:split]]))


def test_other_words_positions_or_pictures_are_other_answers(opened):
    _, _, pairs, _ = opened
    one, image_id = pairs[0], bare_model("300m")[0].image_id
    names = answer_keys(collate_pairs([one]), image_id)
    prompt = one.prompt
    ids, tiles = prompt.ids.copy(), prompt.seen[0].tiles.copy()
    ids[0], tiles[0, 0, 0, 0] = ids[0] - 1, tiles[0, 0, 0, 0] ^ 1
    others = [
        replace(one, prompt=replace(prompt, ids=ids)),
        replace(one, prompt=replace(prompt, positions=prompt.positions / 2)),
        replace(one, prompt=replace(prompt, seen=(replace(prompt.seen[0], tiles=tiles),))),
        replace(one, chosen=one.chosen[::-1].copy(), rejected=one.rejected[:-1]),
    ]
    found = [name for other in others for name in answer_keys(collate_pairs([other]), image_id)]
    assert len({*names, *found}) == 2 + 2 * len(others)
    behind = answer_keys(collate_pairs([pairs[1], one]), image_id)  # wherever it stands in a row
    assert behind[2:] == names


def test_other_weights_or_another_precision_find_nothing(opened, tmp_path):
    _, references, _, _ = opened
    same, other, narrow = (bare_model("300m", seed=seed)[0] for seed in (0, 1, 0))
    narrow.set_dtype(mx.bfloat16)
    wide, _ = bare_model("300m")
    wide.update(narrow.parameters())
    wide.set_dtype(mx.float32)  # the same numbers, computed with in another precision
    assert ReferenceLogProbs(same, tmp_path).folder == references.folder
    folders = [ReferenceLogProbs(model, tmp_path).folder for model in (same, other, narrow, wide)]
    assert len(set(folders)) == 4


def test_a_damaged_file_is_computed_anew(opened):
    _, references, pairs, expected = opened
    references.of(collate_pairs(pairs), None)
    references.flush()
    (path,) = references.folder.iterdir()
    path.write_bytes(path.read_bytes()[:40])
    base, _ = bare_model("300m")
    again = ReferenceLogProbs(base, references.folder.parent)
    assert relative_error(numbers(again.get(collate_pairs(pairs), None)), expected) < 2e-5


def test_once_the_base_is_gone_nothing_is_made_up(opened):
    _, references, pairs, _ = opened
    references.of(collate_pairs(pairs[:1]), None)
    references.freeze()
    assert [path.suffix for path in references.folder.iterdir()] == [".safetensors"]
    assert references.of(collate_pairs(pairs[:1]), None).shape == (8,)
    with pytest.raises(TrainingError, match=r"rows.jsonl:3: no reference was computed before"):
        references.of(collate_pairs(pairs[1:]), None)


def test_a_full_disk_is_told(opened, monkeypatch):
    _, references, pairs, _ = opened
    references.of(collate_pairs(pairs), None)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(TrainingError, match="cannot keep the reference in .*No space left"):
        references.flush()
    assert not list(references.folder.iterdir())
