"""A quantized head is padded to a multiple of eight rows inside, and nobody sees it."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from fixtures.inputs import relative_error, token_row
from fixtures.loaded_models import tiny
from fixtures.tiny import Bits, Recipe
from fixtures.tolerances import rows_tolerance
from mlx.utils import tree_flatten

from internvl3_mlx import load
from internvl3_mlx.loading.build import load_local_model
from internvl3_mlx.models.fused_linear import ROW_MULTIPLE, pad_quantized_rows


def head_of(language):
    return language.lm_head if "lm_head" in language else language.model.embed_tokens


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", [("affine", 4, 64), ("mxfp4", 4, 32)], ids=["affine", "mxfp4"])
def test_logits_are_cut_to_the_vocabulary_and_stay_the_same(tied, mode):
    name, bits, group_size = mode
    packed = Bits(mode=name, bits=bits, group_size=group_size)
    checkpoint = tiny(Recipe(layout="mlx", bits=packed, tied=tied))
    fused = load_local_model(checkpoint.folder).model
    plain = load_local_model(checkpoint.folder, for_training=True).model
    plain.eval()
    vocabulary = fused.config.text.vocab_size
    assert vocabulary % ROW_MULTIPLE
    assert head_of(plain.language_model).weight.shape[0] == vocabulary
    padded = head_of(fused.language_model)
    assert padded.weight.shape[0] == vocabulary + -vocabulary % ROW_MULTIPLE
    states = mx.random.normal((2, 3, fused.config.text.hidden_size), key=mx.random.key(1))
    ours, theirs = (model.language_model.head(states) for model in (fused, plain))
    assert ours.shape == (2, 3, vocabulary)
    assert relative_error(ours, theirs) <= rows_tolerance()
    ids = mx.array([token_row(checkpoint)])
    assert mx.array_equal(fused.embed(ids), plain.embed(ids))


def test_a_published_vocabulary_costs_six_rows():
    layer = nn.QuantizedLinear(128, 151_674, bias=False, bits=2)
    before = sum(part.nbytes for _, part in tree_flatten(layer.parameters()))
    rows = layer(mx.ones((1, 128)))
    assert pad_quantized_rows(layer) == 6
    after = sum(part.nbytes for _, part in tree_flatten(layer.parameters()))
    assert layer.weight.shape[0] == 151_680
    assert after - before == before // 151_674 * 6
    padded = layer(mx.ones((1, 128)))[:, :151_674]
    assert relative_error(padded, rows) <= rows_tolerance()


def test_other_heads_stay_as_they_are():
    linear, even = nn.Linear(64, 13), nn.QuantizedLinear(64, 16)
    assert pad_quantized_rows(linear) == pad_quantized_rows(even) == 0
    assert (linear.weight.shape[0], even.weight.shape[0]) == (13, 16)


def test_no_answer_contains_a_padded_row(monkeypatch):
    checkpoint = tiny(Recipe(layout="mlx", bits=Bits()))
    vlm = load(str(checkpoint.folder))
    monkeypatch.setattr(vlm.tokenizer, "stop_ids", frozenset())
    ids = vlm.ask("Why?", max_tokens=40, temperature=3.0, seed=1).token_ids
    assert max(ids) < vlm.config.text.vocab_size
