"""Our samplers draw the tokens that mlx-lm's draw with the same seed."""

from itertools import product

import mlx.core as mx
import pytest
from mlx_lm import sample_utils

from internvl3_mlx.generation.sampler import Sampler, SamplerState, SamplingParams, draw_tokens

VOCAB = 211
PROMPTS = ([3, 1, 4, 1, 5], [*range(7, 60)], [9])
FILTERS = [
    dict(zip(("top_p", "min_p", "top_k"), chosen, strict=True))
    for chosen in product((1.0, 0.7), (0.0, 0.02), (0, 9))
]
CHANGES = [
    {},
    {"repetition_penalty": 1.3},
    {
        "repetition_penalty": 0.8,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": ((5, 2.0), (17, -3.0), (200, 1.5)),
    },
]


@pytest.fixture(autouse=True)
def not_compiled():
    """Spare the compiler: mlx-lm compiles each filter anew for each setting."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def steps(count: int, rows: int, dtype: mx.Dtype = mx.float32) -> list[mx.array]:
    """Make logits that have no ties."""
    keys = mx.random.split(mx.random.key(4), count)
    return [(2 * mx.random.normal((rows, VOCAB), key=key)).astype(dtype) for key in keys]


def mlx_lm_tokens(params, seed, prompt, logits):
    """Draw with mlx-lm: presence and frequency look at the answer alone, as OpenAI's API says."""
    given = {name: getattr(params, name) for name in ("top_p", "min_p", "top_k")}
    sample = sample_utils.make_sampler(temp=params.temperature, **given)
    make = sample_utils.make_logits_processors
    before = make(dict(params.logit_bias) or None, params.repetition_penalty)
    after = make(
        presence_penalty=params.presence_penalty,
        presence_context_size=len(logits),
        frequency_penalty=params.frequency_penalty,
        frequency_context_size=len(logits),
    )
    mx.random.seed(seed)
    answer: list[int] = []
    for row in logits:
        row = mx.array(row)  # the penalties write into it
        for process in before:
            row = process(mx.array([*prompt, *answer]), row)
        for process in after:
            row = process(mx.array(answer, dtype=mx.int32), row)
        wide = row.astype(mx.float32)
        token = sample(wide - mx.logsumexp(wide, axis=-1, keepdims=True))
        answer.append(int(token.item()))
    return answer


def our_tokens(params, seeds, prompts, logits):
    sampler = Sampler(tuple(params))
    state, found = sampler.init_state(seeds, prompts, VOCAB), []
    for rows in logits:
        tokens, state = sampler(rows, state)
        found.append(tokens)
    return mx.stack(found, axis=1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(changes) or "none")
def test_one_row_draws_what_mlx_lm_draws(temperature, dtype, changes):
    for filters in FILTERS if temperature else FILTERS[:1]:
        # equal log-probabilities are common in bfloat16, and top-k chooses among them
        if dtype == mx.bfloat16 and filters["top_k"]:
            continue
        params = SamplingParams(temperature=temperature, **filters, **changes)
        logits, prompt = steps(15, 1, dtype), PROMPTS[1]
        wanted = mlx_lm_tokens(params, 11, prompt, logits)
        assert our_tokens([params], [11], [prompt], logits) == [wanted], filters
        assert len({*wanted}) > 8


def test_rows_with_settings_of_their_own_draw_as_if_alone():
    params = [
        SamplingParams(temperature=0.8, top_p=0.6, repetition_penalty=1.4),
        SamplingParams(presence_penalty=1.0, logit_bias=((3, 4.0),)),
        SamplingParams(temperature=1.3, top_k=7, min_p=0.01, frequency_penalty=0.5),
        SamplingParams(temperature=1.0, top_k=40, logit_bias=((3, 1.0), (9, 2.0))),
    ]
    prompts, seeds, logits = [*PROMPTS, [2, 2]], [1, 2, 3, 4], steps(30, 4)
    together = our_tokens(params, seeds, prompts, logits)
    for row, own in enumerate(params):
        alone = [rows[row : row + 1] for rows in logits]
        assert together[row] == mlx_lm_tokens(own, seeds[row], prompts[row], alone), row


def test_a_row_goes_on_where_it_was():
    params = (
        SamplingParams(temperature=1.0, repetition_penalty=1.2, frequency_penalty=0.5),
        SamplingParams(temperature=0.5),
    )
    sampler, logits = Sampler(params), steps(8, 2)
    state = sampler.init_state([5, 6], PROMPTS[:2], VOCAB)
    found = []
    for rows in logits[:5]:
        tokens, state = sampler(rows, state)
        found.append(tokens.tolist())
    answers = [[one[row] for one in found] for row in range(2)]
    resumed = sampler.init_state([5, 6], PROMPTS[:2], VOCAB, answers)
    for kept, new in zip(state, resumed, strict=True):
        assert kept.tolist() == new.tolist()
    together, _ = sampler(logits[5], state)
    alone, _ = sampler.select([1])(logits[5][1:], state.select(mx.array([1])))
    assert alone.tolist() == together[1:].tolist()


def test_a_token_that_was_forced_is_remembered_in_place_of_the_drawn_one():
    params = SamplingParams(temperature=1.0, repetition_penalty=1.2, presence_penalty=0.5)
    sampler, (rows,) = Sampler((params,)), steps(1, 1)
    drawn, state = sampler(rows, sampler.init_state([5], [[1, 2]], VOCAB))
    forced = mx.array([3])
    replaced = state.replace_last(forced, drawn)
    wanted = sampler.init_state([5], [[1, 2]], VOCAB, [[3]])
    for kept, new in zip(replaced, wanted, strict=True):
        assert kept.tolist() == new.tolist()
    assert drawn.tolist() != forced.tolist()


def test_top_k_keeps_the_first_of_equal_tokens():
    logits = mx.array([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    scores = Sampler((SamplingParams(temperature=1.0, top_k=3),)).scores(logits)
    assert mx.isfinite(scores).tolist() == [[False, True, True, True, False, False]]
    everything = Sampler((SamplingParams(temperature=1.0, top_k=60),)).scores(logits)
    assert mx.all(mx.isfinite(everything)).item()


def test_a_step_can_be_compiled():
    params = SamplingParams(temperature=1.0, top_p=0.8, repetition_penalty=1.2)
    sampler, logits = Sampler((params,)), steps(6, 1)
    mx.enable_compile()
    compiled = mx.compile(sampler.__call__)
    plain = fast = sampler.init_state([5], PROMPTS[:1], VOCAB)
    for rows in logits:
        token, plain = sampler(rows, plain)
        again, fast = compiled(rows, fast)
        assert token.tolist() == again.tolist()
    assert SamplerState(*fast).history.tolist() == plain.history.tolist()


def test_draws_follow_the_scores():
    scores = mx.log(mx.array([0.1, 0.0, 0.6, 0.3]))
    count = 6000
    keys = mx.random.split(mx.random.key(1), count)
    drawn = draw_tokens(mx.broadcast_to(scores, (count, 4)), keys)
    shares = [float((drawn == token).sum().item()) / count for token in range(4)]
    assert shares == pytest.approx([0.1, 0.0, 0.6, 0.3], abs=0.02)
    assert shares[1] == 0
