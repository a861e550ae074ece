"""GRPO and GSPO: objective, advantages, rewards, and runs that resume to the bit."""

import re
from itertools import takewhile

import mlx.core as mx
import numpy as np
import pytest
import torch
from fixtures.loaded_models import bare_model
from fixtures.records import chat_record, write_jsonl
from fixtures.tolerances import LOSS_TOLERANCE
from fixtures.train_sessions import select, small_session, small_setup, write_data

from internvl3_mlx.errors import UserError
from internvl3_mlx.training.batch import Batch, Prompt, Rollouts
from internvl3_mlx.training.checkpoint import state_arrays
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.events import CheckpointSaved, UpdateDone, ValidationDone
from internvl3_mlx.training.grpo import GRPO
from internvl3_mlx.training.objectives import ObjectiveState
from internvl3_mlx.training.rewards import load_reward, score_answer
from internvl3_mlx.training.rollouts import Sampled, build_batch, group_advantages
from internvl3_mlx.training.run import run_session
from internvl3_mlx.training.session import resume_session

LENGTHS = (3, 1, 4, 2)  # tokens of four answers
ADVANTAGES = np.array([1.2, -0.7, 0.4, -1.1], np.float32)


def log_probs():
    """Return policy, old and reference log-probabilities of ten tokens; some ratios are clipped."""
    draw = np.random.default_rng(3)
    policy = -draw.gamma(2.0, size=10)
    old, reference = (policy + draw.normal(scale=0.4, size=10) for _ in range(2))
    return [x.astype(np.float32) for x in (policy, old, reference)]


def make_batch(old):
    answer_ids = np.repeat(np.arange(4), LENGTHS).astype(np.int32)
    nothing = np.zeros(10, np.int32)
    rollouts = Rollouts(
        ADVANTAGES, np.ones(4, np.float32), np.array([1, 0, 1, 0], np.float32), 0.25, 2.5, old
    )
    return Batch(
        nothing, nothing.astype(np.float32), (), nothing, nothing, answer_ids,
        np.ones(10, np.float32), 4, (), ("rows.jsonl:1",), rollouts=rollouts,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model():
    found, _ = bare_model("300m")
    found.train()
    return found


def our_loss(model, monkeypatch, method, given):
    policy, old, reference = given
    batch = make_batch(old)

    def loss(scores):
        monkeypatch.setattr("internvl3_mlx.training.grpo.target_log_probs", lambda *_: scores)
        output, _ = method(model, batch, None, mx.array(reference), ObjectiveState())
        return output.numerator / output.denominator, output.metrics

    (value, metrics), slope = mx.value_and_grad(loss)(mx.array(policy))
    return value.item(), np.array(slope), metrics


def torch_loss(level, given, beta, low, high):
    """Compute the published objectives in float64: formulas 3 and 4 of GRPO, 5 and 7 of GSPO."""
    policy, old, reference = (torch.tensor(x, dtype=torch.float64) for x in given)
    policy.requires_grad_()
    total = 0.0
    for answer, (scores, before, base) in enumerate(
        zip(*(torch.split(x, LENGTHS) for x in (policy, old, reference)), strict=True)
    ):
        advantage = float(ADVANTAGES[answer])
        ratios = torch.exp(scores - before)
        if level == "sequence":
            ratios = torch.exp((scores - before).sum() / len(scores))
        clipped = torch.clamp(ratios, 1 - low, 1 + high)
        gain = torch.minimum(ratios * advantage, clipped * advantage).mean()
        kl = (torch.exp(base - scores) - (base - scores) - 1).mean()
        total = total - (gain - beta * kl) / 4
    total.backward()
    return total.item(), policy.grad.numpy()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_objective_equals_the_published_one(model, monkeypatch, level, beta):
    method = GRPO(importance_level=level, epsilon=0.05, epsilon_high=0.1, beta=beta)
    value, slope, metrics = our_loss(model, monkeypatch, method, log_probs())
    expected, wanted = torch_loss(level, log_probs(), beta, 0.05, 0.1)
    assert value == pytest.approx(expected, rel=LOSS_TOLERANCE)
    np.testing.assert_allclose(slope, wanted, rtol=LOSS_TOLERANCE, atol=LOSS_TOLERANCE)
    assert 0 < metrics["clip_fraction"].item() < 1
    assert ("kl" in metrics) == bool(beta)
    assert metrics["reward"].item() == 0.5


def test_the_first_update_has_ratios_of_1_and_the_gradient_of_the_policy(model, monkeypatch):
    policy, _, reference = log_probs()
    slopes = []
    for level in ("token", "sequence"):
        method = GRPO(importance_level=level)
        value, slope, metrics = our_loss(model, monkeypatch, method, (policy, None, reference))
        assert value == pytest.approx(-ADVANTAGES.mean(), rel=LOSS_TOLERANCE)
        assert metrics["clip_fraction"].item() == 0
        slopes.append(slope)
    expected = -np.repeat(ADVANTAGES / LENGTHS, LENGTHS) / 4
    np.testing.assert_allclose(slopes[0], expected, rtol=LOSS_TOLERANCE)
    np.testing.assert_allclose(slopes[1], expected, rtol=LOSS_TOLERANCE)


def test_advantages_are_those_of_a_group_and_equal_rewards_have_none():
    rewards = np.array([[1, 0, 0, 1], [0.3, 0.3, 0.3, 0.3], [5, 1, 0, 0]], np.float32)
    expected = torch.tensor(rewards, dtype=torch.float64)
    expected = (expected - expected.mean(1, keepdim=True)) / (expected.std(1, keepdim=True) + 1e-4)
    np.testing.assert_allclose(group_advantages(rewards), expected, atol=1e-6)
    assert group_advantages(rewards)[1].tolist() == [0, 0, 0, 0]


def make_prompt(number):
    ids = np.arange(5 + number, dtype=np.int32)
    return Prompt(ids, ids.astype(np.float32), (), f"rows.jsonl:{number}", "yes", 9)


def prompt_batch(count):
    prompts = tuple(make_prompt(number) for number in range(count))
    empty = np.zeros(0, np.int32)
    return Batch(empty, empty, (), empty, empty, empty, empty, count, (), (), prompts=prompts)


def test_groups_without_any_difference_are_left_out_and_counted():
    answers = tuple(np.arange(1 + n, dtype=np.int32) for n in range(6))
    sampled = Sampled(answers, np.array([[1, 1, 1], [0, 1, 0]], np.float32))
    batch = build_batch(prompt_batch(2), sampled)
    assert batch.locations == ("rows.jsonl:1",)
    assert batch.num_answers == 3
    assert np.bincount(batch.answer_ids).tolist() == [4, 5, 6]
    assert batch.rollouts.zero_variance == 0.5
    assert batch.rollouts.mean_length == 3.5
    assert len(batch.rollouts.rewards) == 6
    same = build_batch(prompt_batch(2), Sampled(answers, np.ones((2, 3), np.float32)))
    assert (same.num_answers, same.rollouts.weights.tolist()) == (1, [0])
    assert same.rollouts.zero_variance == 1


def test_a_reward_is_a_metric_a_pattern_or_a_function_of_a_file(tmp_path):
    assert load_reward("exact")("Cat ", "cat") == 1
    assert load_reward("relaxed")("103", "100") == 1
    assert load_reward("iou")("none", "none") == 0
    assert load_reward("regex")("12 cats", r"\d+ cats?") == 1
    assert load_reward("regex")("12 cats!", r"\d+ cats?") == 0
    file = tmp_path / "mine.py"
    file.write_text("def short(answer, expected):\n    return 1 / len(answer)\n")
    assert load_reward(f"{file}:short")("abcd", "") == 0.25


@pytest.mark.parametrize(
    ("reward", "answer", "message"),
    [
        ("regex", "((", "the answer is not a regular expression .*correct it"),
        ("iou", "the left one", "the answer has no box, and --reward iou compares boxes"),
    ],
)
def test_an_answer_that_no_reward_can_compare_is_found_before_the_run(
    tmp_path, reward, answer, message
):
    rows = [chat_record(answer=answer), chat_record(answer="<box>[[1, 2, 300, 400]]</box>")]
    write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    setup = small_setup(tmp_path, method="grpo", reward=reward)
    [error] = setup.train.report.errors
    assert error.location.endswith("train.jsonl:1")
    assert re.search(message, error.message)


def test_a_pattern_that_would_match_forever_is_one_line():
    with pytest.raises(UserError, match="rows.jsonl:7: the reward of 'aaaa.*' failed: TimeoutErr"):
        score_answer(load_reward("regex"), "a" * 60 + "!", r"((a+)+)+b?c|(a|a)*d", "rows.jsonl:7")


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("def f(a, b): return 1 / 0", "f", "rows.jsonl:7: the reward of 'no' failed: ZeroDivision"),
        ("def f(a, b): return 'x'", "f", "rows.jsonl:7: the reward of 'no' is 'x'; expected a fin"),
        ("def f(a, b): return float('nan')", "f", "is nan; expected a finite number"),
        ("def f(a, b): return 1", "g", "has no function 'g'; define g"),
        ("def f(", "f", "cannot be run: SyntaxError"),
    ],
)
def test_an_error_of_a_reward_function_is_one_line(tmp_path, text, name, message):
    file = tmp_path / "mine.py"
    file.write_text(text + "\n")
    with pytest.raises(UserError, match=message) as caught:
        score_answer(load_reward(f"{file}:{name}"), "no", "yes", "rows.jsonl:7")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": "rouge"}, "unknown reward 'rouge'; expected exact, relaxed"),
        ({"reward": "exact", "packing": True}, "packing cannot be combined with method grpo"),
        ({"reward": "exact", "beta": 0.1, "train": ("lora", "mlp1")}, "train lora only, or set"),
        ({"reward": "exact", "method": "sft"}, "reward needs method grpo"),
    ],
)
def test_settings_that_sampling_cannot_use_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**{"method": "grpo", **settings})


def test_a_reward_must_be_named(tmp_path):
    write_data(tmp_path / "data", 2)
    with pytest.raises(UserError, match="method grpo needs a reward; name one with --reward: ex"):
        small_setup(tmp_path, method="grpo")


REWARD = """
calls = 0
fails_at = None
def length(answer, expected):
    global calls
    calls += 1
    if calls == fails_at:
        raise KeyboardInterrupt
    return len(answer) % 5 / 4
"""
RUN = {
    "method": "grpo", "num_generations": 3, "max_completion_length": 5, "num_iterations": 2,
    "grad_accumulation_steps": 2, "batch_size": 2, "iters": 5, "save_every": 3, "beta": 0.05,
    "steps_per_eval": 5, "keep_last": 9, "importance_level": "sequence", "epsilon": 0.01,
    "lora_dropout": 0.0, "learning_rate": 3e-3,
}  # fmt: skip


def run_of(folder, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder / "data", 5, 2)
    (folder / "mine.py").write_text(REWARD)
    return small_session(folder, **{**RUN, "reward": f"{folder / 'mine.py'}:length", **settings})


def losses(events):
    return [(e.update, e.loss, e.metrics) for e in select(events, UpdateDone | ValidationDone)]


def test_a_run_killed_in_a_group_or_between_iterations_resumes_to_the_bit(tmp_path):
    """The checkpoint of update 3 lies between the two updates of a group of answers."""
    whole = run_of(tmp_path / "one")
    expected = [*run_session(whole)]
    end = {name: np.array(x) for name, x in state_arrays(whole.state).items()}
    updates = select(expected, UpdateDone)
    assert len(updates) == 5
    assert {"reward", "zero_variance", "completion_length", "kl", "clip_fraction"} <= (
        updates[0].metrics.keys()
    )
    assert updates[0].metrics["clip_fraction"] == 0
    assert any(one.grad_norm > 0 for one in updates)
    [validation] = select(expected, ValidationDone)
    assert validation.loss == pytest.approx(1 - validation.metrics["reward"], abs=1e-6)

    first = run_of(tmp_path / "two")
    began = [*takewhile(lambda e: not isinstance(e, CheckpointSaved), run_session(first))]
    second = run_of(tmp_path / "two")
    resume_session(second, accept_changes=False)
    assert second.state.update == 3
    second.rollouts.reward.__globals__["fails_at"] = 8  # in the middle of the next answers
    interrupted: list = []
    with pytest.raises(KeyboardInterrupt):
        interrupted.extend(run_session(second))
    assert [event.update for event in select(interrupted, UpdateDone)] == [4]
    third = run_of(tmp_path / "two")
    resume_session(third, accept_changes=False)
    assert third.state.update == 4
    continued = [*run_session(third)]
    assert losses([*began, *interrupted, *continued]) == losses(expected)
    found = {name: np.array(x) for name, x in state_arrays(third.state).items()}
    assert found.keys() == end.keys()
    assert all(np.array_equal(found[name], end[name]) for name in end)


def test_rewards_rise(tmp_path):
    """The shortest reward that can be learned in seconds: short answers."""
    settings = {"iters": 10, "num_iterations": 1, "num_generations": 8, "learning_rate": 1e-2}
    here = run_of(tmp_path, **settings, beta=0.0, importance_level="token", epsilon=0.2)
    here.rollouts.reward.__globals__["length"].__code__ = (
        lambda answer, expected: -float(len(answer))
    ).__code__
    rewards = [e.metrics["reward"] for e in run_session(here) if isinstance(e, UpdateDone)]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3])
