"""Candidates are those of separate runs; the best is chosen as each method says."""

import json
import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe
from fixtures.tolerances import LOSS_TOLERANCE, TOLERANCE

from internvl3_mlx import UserError, load, load_critic
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.prompt_cache import PromptCache
from internvl3_mlx.models.segmented_cache import SegmentedKVCache
from internvl3_mlx.prompt.reasoning import PRM_SYSTEM_PROMPT, cot_question
from internvl3_mlx.test_time_scaling import best_of as module
from internvl3_mlx.test_time_scaling.best_of import (
    BestOfConfig,
    BestOfQuestion,
    BestOfResult,
    CandidateScored,
    CandidateWritten,
    best_of_events,
    best_of_in_turns,
)
from internvl3_mlx.test_time_scaling.critic import ResponseScore, StepScore, open_critic
from internvl3_mlx.test_time_scaling.critic_source import find_critic
from internvl3_mlx.test_time_scaling.memory_plan import MemoryPlan, ModelChoice, plan_memory

CAT, DOG = random_image(130, 70), random_image(60, 60, 1)
ASKED = ("Which is larger?", [CAT, DOG])
SHORT = {"max_tokens": 10, "temperature": 1.0, "seed": 7}


@pytest.fixture(scope="module")
def vlm():
    return load(str(tiny(Recipe(head_dim=64)).folder))


@pytest.fixture(scope="module")
def other():
    """A critic whose vocabulary is not the policy's."""
    return open_critic(load(str(tiny(Recipe(style="9b")).folder)).runner)


@pytest.mark.parametrize("cache", [{}, {"kv_bits": 8, "kv_group_size": 32}])
def test_candidates_are_the_greedy_answer_and_those_of_the_next_seeds(vlm, monkeypatch, cache):
    made = []
    spread = SegmentedKVCache.spread
    monkeypatch.setattr(SegmentedKVCache, "spread", lambda self: made.append(self) or spread(self))
    found = vlm.best_of(*ASKED, n=4, method="log-prob", **SHORT, **cache)
    greedy = vlm.ask(*ASKED, max_tokens=10, **cache)
    settings = {**SHORT, "top_p": 0.95, **cache}
    sampled = [vlm.ask(*ASKED, **{**settings, "seed": 7 + at}) for at in range(1, 4)]
    assert [c.answer.token_ids for c in found.candidates] == [
        answer.token_ids for answer in (greedy, *sampled)
    ]
    assert len({tuple(c.answer.token_ids) for c in found.candidates}) == 4
    assert made


def test_the_published_settings_are_the_defaults(vlm, monkeypatch):
    seen = []
    write = module.write_candidates
    monkeypatch.setattr(
        module, "write_candidates", lambda *a, **k: seen.append(a[2]) or write(*a, **k)
    )
    vlm.best_of("What?", n=2, max_tokens=3)
    config = seen[0]
    assert (config.temperature, config.top_p, config.seed) == (0.6, 0.95, 0)
    assert module.BestOfConfig().n == 8


def test_log_probabilities_are_those_of_a_forward_pass(vlm):
    """Taken over the answer's tokens and the end, at temperature 1, in float64 NumPy."""
    found = vlm.best_of(*ASKED, n=3, method="log-prob", **SHORT)
    prompt = vlm.prepare_inputs(*ASKED)
    for candidate in found.candidates:
        answer = candidate.answer
        ids = [*prompt.token_ids, *answer.token_ids]
        ids += [vlm.tokenizer.im_end_id] * (answer.finish_reason == "stop")
        logits = np.array(vlm.model(mx.array([ids]), mx.array(prompt.tiles))[0], np.float64)
        rows = logits[len(prompt.token_ids) - 1 : -1]
        log_probs = rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))
        written = ids[len(prompt.token_ids) :]
        wanted = log_probs[np.arange(len(written)), written].mean()
        assert answer.mean_log_prob == pytest.approx(wanted, abs=TOLERANCE)
        assert candidate.score == answer.mean_log_prob
    best = max(candidate.score for candidate in found.candidates)
    assert found.answer.mean_log_prob == best


def test_the_prompt_stays_in_the_cache_for_more_candidates(vlm):
    config = GenerationConfig(**SHORT)
    inputs = vlm.runner.build_inputs(*ASKED, config)
    cache = PromptCache()
    found = []
    for _ in range(2):
        asked = BestOfQuestion(*ASKED, config)
        events = best_of_events(asked, BestOfConfig(n=3), vlm.runner, inputs=inputs, cache=cache)
        found.append([*events][-1])
    first, again = ([c.answer for c in result.candidates] for result in found)
    assert [a.token_ids for a in first] == [a.token_ids for a in again]
    assert first[0].usage.cached_tokens == 0
    assert again[0].usage.cached_tokens == len(inputs.token_ids) - 1
    alone = vlm.ask(*ASKED, **SHORT)
    assert vlm.runner.answer(inputs, config, cache).token_ids == alone.token_ids


class Judge:
    """A critic with given scores by text, 0 for all others; it remembers what it was asked."""

    def __init__(self, scores):
        self.scores, self.judged, self.asked = scores, [], []
        self.runner = type("Runner", (), {"name": "judge"})

    def open(self, question, images, config):
        self.asked.append((question, len(images)))
        return self

    def score(self, text, mode, *, max_steps):
        self.judged.append(text)
        score = self.scores.get(text, 0.0) if text else -math.inf
        return ResponseScore(score, (StepScore(text, score),), mode)


def result_of(vlm, texts, judge, **config):
    """Choose among given texts."""
    answer = vlm.ask("What?", max_tokens=1)
    answers = [replace(answer, text=text) for text in texts]
    asked = BestOfQuestion("What?", [CAT], GenerationConfig(cot=True))
    return [*module.choose(asked, BestOfConfig(**config), answers, judge)]


def test_equal_texts_are_scored_once_and_ties_go_to_the_first(vlm):
    judge = Judge({"a": 0.5, "b": 0.5, "c": 0.25})
    *scored, result = result_of(vlm, ["c", "b", "a", "b", ""], judge, method="critic")
    assert judge.judged == ["c", "b", "a", ""]
    assert [(event.index, event.done, event.total) for event in scored] == [
        (0, 1, 4), (1, 2, 4), (2, 3, 4), (4, 4, 4),
    ]  # fmt: skip
    assert result.index == 1
    assert [c.score for c in result.candidates] == [0.25, 0.5, 0.5, 0.5, -math.inf]


def test_a_critic_is_asked_all_that_the_policy_was(vlm):
    judge = Judge({})
    result_of(vlm, ["a"], judge, method="critic")
    assert judge.asked == [(cot_question("What?"), 1)]


def test_an_empty_candidate_loses_to_the_worst(vlm):
    for method, judge in (("critic", Judge({"a": -5.0})), ("vote", None), ("log-prob", None)):
        *_, result = result_of(vlm, ["", "a"], judge, method=method, critic_mode="hard")
        assert result.index == (method != "log-prob")  # neither has a log-probability here
    *_, empty = result_of(vlm, ["", " "], Judge({}), method="critic")
    assert (empty.index, empty.to_dict()["best_of"]["score"]) == (0, None)


def test_votes_decide_without_a_critic(vlm):
    texts = ["Answer: 3", "I say\nAnswer: 4", r"\boxed{4}", "Answer: 3", "4."]
    *_, result = result_of(vlm, texts, None)
    assert (result.index, result.score, result.method) == (1, 0.6, "vote")


def test_a_thought_is_judged_with_its_answer(vlm):
    answer = replace(vlm.ask("What?", max_tokens=1), text="Yes.", reasoning="One.\n\nTwo.")
    assert module.response_text(answer) == "One.\n\nTwo.\n\nYes."
    assert module.response_text(replace(answer, text="")) == ""


def test_a_critic_with_another_vocabulary_decides(vlm, other):
    events = [*vlm.stream_best_of(*ASKED, n=3, critic=other, **SHORT)]
    *told, result = events
    texts = [candidate.answer.text for candidate in result.candidates]
    wanted = [other.open(*ASKED).score(text).score for text in texts]
    assert [c.score for c in result.candidates] == pytest.approx(wanted, abs=LOSS_TOLERANCE)
    assert result.index == int(np.argmax(wanted))
    assert [type(event) for event in told] == [CandidateWritten] * 3 + [CandidateScored] * 3
    assert sorted(event.index for event in told[:3]) == [0, 1, 2]


def test_one_candidate_is_the_greedy_answer(vlm, other):
    for critic in (None, other):
        result = vlm.best_of(*ASKED, n=1, critic=critic, max_tokens=8)
        assert result.answer.token_ids == vlm.ask(*ASKED, max_tokens=8).token_ids


def test_models_in_turns_give_the_same_and_are_not_held_together(vlm, other):
    asked = BestOfQuestion(*ASKED, GenerationConfig(**SHORT))
    config = BestOfConfig(n=3, method="critic", critic_mode="orm")
    together = [*best_of_events(asked, config, vlm.runner, other)][-1]
    order = []
    written = best_of_in_turns(
        asked,
        config,
        lambda: order.append("policy") or vlm.runner,
        lambda: order.append("critic") or other,
    )
    for event in written:
        order.append(type(event).__name__)
    assert order[:5] == ["policy", *["CandidateWritten"] * 3, "critic"]
    assert isinstance(event, BestOfResult)
    assert [c.score for c in event.candidates] == [c.score for c in together.candidates]


def test_the_result_as_json(vlm, other):
    content = vlm.best_of(*ASKED, n=2, critic=other, **SHORT).to_dict()
    chosen = content["best_of"]
    assert json.loads(json.dumps(content)) is not None
    assert content["text"] == chosen["candidates"][chosen["index"]]["text"]
    assert (chosen["n"], chosen["method"], chosen["critic_mode"]) == (2, "critic", "soft")
    assert chosen["candidates"][0]["steps"][0]["score"] == pytest.approx(
        chosen["candidates"][0]["score"], abs=1
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "at temperature 0 all candidates are the same"),
        ({"method": "critic"}, "method critic needs a critic; name one, or choose by vote"),
        ({"method": "best"}, "method is 'best'; choose from critic, vote, log-prob"),
        ({"n": 0}, "n is 0 and max_steps 16; both are at least 1"),
        ({"lookup": True}, "best-of-N samples its answers; drop lookup and draft_model"),
        ({"method": "log-prob", "regex": "a"}, "choosing by log-probability needs answers that"),
        ({"seed": None}, "best-of-N needs a seed"),
        ({"critic": open_critic, "video": "a.mp4"}, "a critic judges images alone"),
        ({"critic_mode": "v2"}, "critic_mode is 'v2'; choose from soft, hard, orm"),
    ],
)
def test_contradictions_are_refused(vlm, options, message):
    with pytest.raises(UserError, match=message):
        vlm.best_of("What?", **{"max_tokens": 2, **options})


def test_models_take_turns_where_both_do_not_fit():
    small = MemoryPlan(policy=2_000_000_000, critic=5_000_000_000, cache=10**9, limit=11 * 10**9)
    assert not small.in_turns
    large = replace(small, critic=6_000_000_000)
    assert large.in_turns
    assert "the model (2.0 GB) and the critic (6.0 GB) do not fit into 11.0 GB" in large.note


def test_memory_is_estimated_before_anything_loads(vlm):
    folder = str(tiny(Recipe(head_dim=64)).folder)
    notes = []
    plan = plan_memory(ModelChoice(folder), ModelChoice(folder), 1000, notes.append)
    assert plan.policy == plan.critic == pytest.approx(vlm.runner.weights_nbytes, rel=0.02)
    quantized = plan_memory(ModelChoice(folder, 4), ModelChoice(folder, 8), 1000, notes.append)
    assert quantized.policy < quantized.critic < plan.critic
    assert plan.cache == 1000 * 2 * 3 * 2 * 64 * 2
    assert notes == []


def test_published_critics_have_names():
    assert find_critic("VisualPRM-8B").model == "OpenGVLab/VisualPRM-8B"
    assert find_critic("visualprm").model == "OpenGVLab/VisualPRM-8B-v1_1"
    assert find_critic("someone/critic").model == "someone/critic"


def test_a_trained_adapter_is_a_critic_with_the_prompt_of_its_data(tmp_path):
    folder = tmp_path / "run" / "best"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "demo"}')
    (tmp_path / "run" / "train_config.yaml").write_text("method: prm\n")
    source = find_critic(str(folder))
    assert (source.model, source.adapter, source.system) == ("demo", str(folder), "prm")
    (tmp_path / "run" / "train_config.yaml").write_text("method: sft\n")
    assert find_critic(str(folder)).system is None
    with pytest.raises(UserError, match="no critic 'visualprm8b'; did you mean visualprm-8b?"):
        find_critic("visualprm8b")
    assert load_critic("demo", system="prm").system == PRM_SYSTEM_PROMPT


def test_an_adapter_without_its_base_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="does not say which model it adapts"):
        find_critic(str(tmp_path))
