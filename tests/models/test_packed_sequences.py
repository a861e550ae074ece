"""Packed sequences attend as if alone, or behind their prefix."""

import mlx.core as mx
import numpy as np
import pytest
from fixtures.inputs import relative_error, token_row
from fixtures.loaded_models import bare_model, numbers
from fixtures.tolerances import TOLERANCE

from internvl3_mlx.models.packed_sequences import PackedSequences, Span

ALONE = (Span(0, 1), Span(1, 8), Span(8, 9), Span(9, 20))
BRANCHED = (
    Span(0, 7),
    Span(7, 12, (0, 7)),
    Span(12, 13, (0, 7)),
    Span(13, 14),
    Span(14, 15, (13, 14)),
    Span(15, 18, (13, 14)),
)


def seen_by(spans, length):
    """Write down who sees whom: (L, L), True where row i looks at column j."""
    mask = np.zeros((length, length), bool)
    for span in spans:
        for row in range(span.start, span.stop):
            mask[row, span.start : row + 1] = True
            if span.prefix:
                mask[row, slice(*span.prefix)] = True
    return mask


def softmax_attention(q, k, v, mask):
    """Attend in float64: q (B, H, L, D), k v (B, KV, L, D)."""
    repeat = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x.astype(np.float64), repeat, axis=1) for x in (k, v))
    scores = np.where(mask, q.astype(np.float64) @ k.swapaxes(2, 3) / q.shape[-1] ** 0.5, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v


@pytest.mark.parametrize("spans", [ALONE, BRANCHED])
def test_spans_attend_like_the_mask(spans):
    length, draw = spans[-1].stop, np.random.default_rng(1)
    q = draw.normal(size=(2, 6, length, 24)).astype(np.float32)
    k, v = (draw.normal(size=(2, 3, length, 24)).astype(np.float32) for _ in "kv")
    ours = numbers(PackedSequences(spans).attend(mx.array(q), mx.array(k), mx.array(v)))
    theirs = softmax_attention(q, k, v, seen_by(spans, length))
    assert relative_error(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("delta", [1, 1 / 4])
@pytest.mark.parametrize("style", ["300m", "6b", "9b"])
def test_packed_sequences_have_the_same_states_as_alone(style, delta):
    model, checkpoint = bare_model(style)
    samples = [token_row(checkpoint, (1,), seed=1), [7], token_row(checkpoint, seed=2)]
    cuts = np.cumsum([0, *map(len, samples)])
    spans = [Span(int(a), int(b)) for a, b in zip(cuts, cuts[1:], strict=False)]
    places = [places_of(ids, checkpoint.image_id, delta) for ids in samples]
    features = mx.random.normal((1, checkpoint.recipe.tokens_per_tile, width(checkpoint)))
    packed = states(model, np.concatenate(samples), np.concatenate(places), features, spans)
    for ids, place, span in zip(samples, places, spans, strict=True):
        own = features if checkpoint.image_id in ids else None
        alone = states(model, np.array(ids), place, own, [Span(0, len(ids))])
        assert relative_error(packed[span.start : span.stop], alone) < TOLERANCE
        assert relative_error(alone, plain_states(model, ids, place, own)) < TOLERANCE


def test_two_answers_to_one_prompt_have_the_same_states_as_alone():
    model, checkpoint = bare_model("6b")
    prompt, answers = token_row(checkpoint, seed=4), ([5, 6, 7, 8, 9], [11])
    first = len(prompt)
    spans = [Span(0, first)]
    for answer in answers:
        begin = spans[-1].stop
        spans.append(Span(begin, begin + len(answer), (0, first)))
    row = np.array([*prompt, *answers[0], *answers[1]])
    places = np.concatenate([np.arange(first), *(first + np.arange(len(a)) for a in answers)])
    branched = states(model, row, places, None, spans)
    for answer, span in zip(answers, spans[1:], strict=True):
        whole = [*prompt, *answer]
        alone = plain_states(model, whole, np.arange(len(whole)), None)
        assert relative_error(branched[span.start : span.stop], alone[first:]) < TOLERANCE


def test_rows_select_states_in_any_order_and_twice():
    model, checkpoint = bare_model("300m")
    ids = np.array(token_row(checkpoint, seed=5))
    spans, places = [Span(0, 4), Span(4, len(ids))], np.arange(len(ids))
    every = states(model, ids, places, None, spans)
    rows = [6, 3, 3, 0]
    chosen = states(model, ids, places, None, spans, mx.array(rows))
    assert relative_error(chosen, every[rows]) < TOLERANCE


def places_of(ids, image_id, delta):
    return np.cumsum(np.where(np.array(ids) == image_id, delta, 1)) - 1


def width(checkpoint):
    return checkpoint.recipe.text["hidden_size"]


def states(model, ids, places, features, spans, rows=slice(None)):
    """Read one row cut into spans: -> (R, D)."""
    language = model.language_model
    rotary = language.rotary(mx.array(places.astype(np.float32)), len(ids))
    kept = [PackedSequences(tuple(spans))] * len(language.model.layers)
    x = model.embed(mx.array(ids)[None], features)
    return numbers(language.model(x, rotary, kept, rows))[0]


def plain_states(model, ids, places, features):
    language = model.language_model
    rotary = language.rotary(mx.array(places.astype(np.float32)), len(ids))
    return numbers(language.model(model.embed(mx.array([ids]), features), rotary))[0]
