"""Token log-probabilities: correct for every kind of head, without the full logits matrix."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from fixtures.inputs import relative_error
from fixtures.loaded_models import bare_model, numbers
from fixtures.tolerances import TOLERANCE
from mlx.utils import tree_flatten

from internvl3_mlx.models.decoder import LanguageModel
from internvl3_mlx.models.lora import LoRALinear
from internvl3_mlx.training.token_log_probs import token_log_probs

VOCABULARY = 151_674  # InternVL3's
STATES, CHUNK = 11, 4  # the last chunk is shorter
HEADS = [
    "frozen",
    "trained",
    "packed",
    "adapted",
    "packed and adapted",
    "tied",
    "tied and trained",
    "tied and packed",
]


def language_with(head):
    """Make a language model whose head is of a kind, and say which weights of it are trained."""
    mx.random.seed(7)  # the same factors whatever was drawn before
    model, _ = bare_model("300m", tied=head.startswith("tied"))
    language = model.language_model
    if "packed" in head:
        packed = "model.embed_tokens" if head.startswith("tied") else "lm_head"
        nn.quantize(language, class_predicate=lambda path, _: path == packed)
    if "adapted" in head:
        language.lm_head = LoRALinear.from_base(language.lm_head, rank=3, scale=2.0)
        language.lm_head.lora_B = mx.random.normal(language.lm_head.lora_B.shape)
    language.freeze()
    if "trained" in head:
        (language.model.embed_tokens if head.startswith("tied") else language.lm_head).unfreeze()
    if "adapted" in head:
        language.lm_head.unfreeze(keys=["lora_A", "lora_B"], recurse=False)
    return language


def case(language, count=STATES):
    draw = np.random.default_rng(3)
    config = language.config
    states = mx.array(draw.normal(size=(count, config.hidden_size)).astype(np.float32))
    targets = mx.array(draw.integers(0, config.vocab_size, size=count).astype(np.int32))
    weigh = mx.array(draw.normal(size=count).astype(np.float32))
    return states, targets, weigh


def every_logit(language, states, targets):
    logits = language.head(states)
    return mx.take_along_axis(nn.log_softmax(logits), targets[:, None], axis=-1)[:, 0]


@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_values_and_gradients_equal_those_of_the_full_logits(head, learning):
    language = language_with(head)
    states, targets, weigh = case(language)

    def in_chunks(states):
        return token_log_probs(language, states, targets, chunk=CHUNK, needs_grad=learning) @ weigh

    def at_once(states):
        return every_logit(language, states, targets) @ weigh

    ours, theirs = (gradients_of(language, loss, states) for loss in (in_chunks, at_once))
    assert ours.keys() == theirs.keys()
    assert (len(ours) > 2) == ("trained" in head or "adapted" in head)
    errors = {name: relative_error(ours[name], theirs[name]) for name in theirs}
    assert max(errors.values()) < TOLERANCE, errors


def gradients_of(language, loss, states):
    """Give a loss's value and its gradient by the states and by all that is trained."""

    def of_both(weights, states):
        language.update(weights)
        return loss(states)

    weights = language.trainable_parameters()
    value, (by_weights, by_states) = mx.value_and_grad(of_both, argnums=(0, 1))(weights, states)
    language.update(weights)
    named = {name: numbers(x) for name, x in tree_flatten(by_weights)}
    return {"value": numbers(value), "states": numbers(by_states), **named}


def test_values_equal_float64():
    language = language_with("frozen")
    states, targets, _ = case(language)
    logits = np.array(states, np.float64) @ np.array(language.lm_head.weight, np.float64).T
    highest = logits.max(axis=1)
    total = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
    expected = logits[np.arange(STATES), np.array(targets)] - total
    ours = token_log_probs(language, states, targets, chunk=CHUNK)
    assert ours.dtype == mx.float32
    assert relative_error(numbers(ours), expected) < TOLERANCE


def test_half_precision_is_accumulated_in_float32():
    language = language_with("frozen")
    states, targets, _ = case(language)
    language.set_dtype(mx.bfloat16)
    ours = token_log_probs(language, states.astype(mx.bfloat16), targets)
    logits = language.head(states.astype(mx.bfloat16)).astype(mx.float32)
    expected = nn.log_softmax(logits)[mx.arange(STATES), targets]
    assert ours.dtype == mx.float32
    assert relative_error(numbers(ours), numbers(expected)) < TOLERANCE


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_the_full_logits_matrix_never_exists(head):
    count, chunk = 192, 4
    language = wide_language(head)
    states, targets, weigh = case(language, count)
    weights = language.trainable_parameters()
    mx.eval(states, targets, weigh, language.parameters())

    def loss(weights, states):
        language.update(weights)
        return token_log_probs(language, states, targets, chunk=chunk, needs_grad=True) @ weigh

    used = peak(lambda: mx.value_and_grad(loss, argnums=(0, 1))(weights, states))
    table, matrix = count * VOCABULARY * 4, language.lm_head.weight.nbytes
    own = 3 * matrix if head == "trained" else 0  # its gradient: a sum, a chunk's, the next sum
    assert used < table / 2 + own
    assert peak(lambda: every_logit(language, states, targets)) > table  # what is looked for shows


def wide_language(head):
    """Make a narrow decoder with a vocabulary of the published size."""
    model, _ = bare_model("300m")
    narrow = replace(model.config.text, vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1)
    language = LanguageModel(narrow)
    language.freeze()
    if head == "trained":
        language.lm_head.unfreeze()
    return language


def peak(compute):
    """Say how many bytes more than before exist at once while something is computed."""
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(compute())
    return mx.get_peak_memory() - before
