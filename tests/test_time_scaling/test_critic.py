"""A critic's scores: of planted logits, of one forward pass and of many, and of its own replies."""

import json
import math
import shutil

import mlx.core as mx
import numpy as np
import pytest
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe
from fixtures.tolerances import LOSS_TOLERANCE

from internvl3_mlx import PromptError, UserError, load
from internvl3_mlx.prompt.messages import DEFAULT_SYSTEM
from internvl3_mlx.prompt.reasoning import PRM_SYSTEM_PROMPT
from internvl3_mlx.test_time_scaling.critic import open_critic

CAT, DOG = random_image(130, 70), random_image(60, 60, 1)
ASKED = ("Which is larger?", [CAT])
RESPONSE = "The cat is red.\n\nThe dog + the tail - blue.\n\n\nSo the cat 看图."


@pytest.fixture(scope="module", params=["300m", "9b"])
def critic(request):
    """Critics with a byte-level and with a sentencepiece vocabulary."""
    return open_critic(load(str(tiny(Recipe(style=request.param)).folder)).runner)


def plant(critic, value):
    """Return a critic whose head gives + the logit of - plus ``value``, wherever it is asked."""
    runner = critic.runner
    head = runner.model.language_model.head

    class Planted(type(runner.model.language_model)):
        def head(self, x):
            logits = head(x)
            columns = mx.arange(logits.shape[-1])
            wrong = logits[..., critic.incorrect_id : critic.incorrect_id + 1]
            return mx.where(columns == critic.correct_id, wrong + value, logits)

    return Planted


@pytest.mark.parametrize("value", [0.0, 2.0, -3.5])
def test_planted_logits_give_the_known_scores(critic, monkeypatch, value):
    language = critic.runner.model.language_model
    monkeypatch.setattr(language, "__class__", plant(critic, value))
    wanted = 1 / (1 + math.exp(-value))
    found = critic.open(*ASKED).score(RESPONSE)
    assert [step.score for step in found.steps] == pytest.approx([wanted] * 3)
    assert found.score == pytest.approx(wanted)
    assert critic.open(*ASKED).score(RESPONSE, "orm").score == pytest.approx(wanted)


def reference_scores(critic, session, steps):
    """Compute P(+) of each step by one forward pass over text put together here, in float64."""
    runner, tokenizer = critic.runner, critic.runner.tokenizer
    images = session.images
    per_tile = runner.config.num_image_token
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    scores = []

    def say(text):
        return tokenizer.encode_text(text, specials=True)

    start = f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n<|im_start|>user\n### Question:\n"
    text, replies = start, []
    for number, image in enumerate(images):
        label = f"Image-{number + 1}: " if len(images) > 1 else ""
        run = "<IMG_CONTEXT>" * (image.info.tiles * per_tile)
        text += f"{label}<img>{run}</img>\n"
    text += f"{session.question}\n\n### Solution Process:\n{steps[0]}"
    for at, step in enumerate(steps):
        text += f"{step}<|im_end|>\n<|im_start|>assistant\n" if at else ""
        text += "" if at else "<|im_end|>\n<|im_start|>assistant\n"
        replies.append(len(ids) + len(say(text)) - 1)
        if at + 1 < len(steps):
            ids += [*say(text), critic.correct_id]
            text = "<|im_end|>\n<|im_start|>user\n"
    ids += say(text)
    tiles = mx.array(np.concatenate([image.tiles for image in images])) if images else None
    logits = np.array(runner.model(mx.array([ids]), tiles)[0].astype(mx.float32), np.float64)
    for position in replies:
        pair = logits[position, [critic.correct_id, critic.incorrect_id]]
        scores.append(np.exp(pair[0]) / np.exp(pair).sum())
    return scores


@pytest.mark.parametrize("images", [[], [CAT], [CAT, DOG]])
def test_soft_scores_are_those_of_the_published_prompt(critic, images):
    session = critic.open("Which is larger?", images)
    found = session.score(RESPONSE)
    wanted = reference_scores(critic, session, RESPONSE.split("\n\n"))
    np.testing.assert_allclose([step.score for step in found.steps], wanted, atol=LOSS_TOLERANCE)
    assert found.score == pytest.approx(np.mean(wanted), abs=LOSS_TOLERANCE)
    assert len({*map(float, wanted)}) == 3


@pytest.mark.parametrize("images", [[], [CAT], [CAT, DOG]])
@pytest.mark.parametrize(
    "response", [RESPONSE, "Only one step.", "一\n\n二\n\n三", "\n\n".join("ab" * 20)]
)
def test_one_forward_pass_agrees_with_one_for_each_step(critic, images, response):
    together = critic.open("Which is larger?", images).score(response)
    texts = [step.text for step in together.steps]
    alone = critic.open("Which is larger?", images).score_step_by_step(texts)
    difference = [a.score - b.score for a, b in zip(together.steps, alone, strict=True)]
    assert max(map(abs, difference)) < LOSS_TOLERANCE
    assert len(texts) <= 16


def test_a_session_gives_each_response_what_it_gets_alone(critic):
    """Responses share their first steps: nothing that is scored may come from the cache."""
    responses = [RESPONSE, "The cat is red.\n\nThe dog + the tail - red.", RESPONSE, "The cat"]
    session = critic.open(*ASKED)
    found = [session.score(response).score for response in responses]
    alone = [critic.open(*ASKED).score(response).score for response in responses]
    np.testing.assert_allclose(found, alone, atol=LOSS_TOLERANCE)
    distances = np.diff(np.sort(found))  # two responses are the same
    assert sum(distances > 1e-4) == 2


def test_steps_are_found_whatever_the_size_of_a_prefill_chunk(vlm, monkeypatch):
    from internvl3_mlx.generation import engine

    whole = open_critic(vlm.runner).open(*ASKED).score(RESPONSE)
    monkeypatch.setattr(engine, "prefill_step_size", lambda: 7)
    parts = open_critic(vlm.runner).open(*ASKED).score(RESPONSE)
    difference = [a.score - b.score for a, b in zip(whole.steps, parts.steps, strict=True)]
    assert max(map(abs, difference)) < LOSS_TOLERANCE


def test_images_are_encoded_once(vlm, monkeypatch):
    looked = []
    see = type(vlm.model).get_image_features
    monkeypatch.setattr(
        type(vlm.model),
        "get_image_features",
        lambda self, tiles: looked.append(1) or see(self, tiles),
    )
    session = open_critic(vlm.runner).open("Which?", [CAT, DOG])
    for response in ("a\n\nb", "c", "a\n\nd"):
        for mode in ("soft", "hard", "orm"):
            session.score(response, mode)
    assert looked == [1]


class Replies:
    """A runner whose replies are given; it records what the critic reads."""

    def __init__(self, runner, replies):
        self.runner, self.waiting, self.read = runner, [*replies], []

    def __getattr__(self, name):
        return getattr(self.runner, name)

    def answer(self, inputs, config, cache):
        self.read.append(self.runner.tokenizer.decode(inputs.token_ids))
        self.config = config
        answer = self.runner.answer(inputs, config, cache)
        object.__setattr__(answer, "text", self.waiting.pop(0))
        return answer


def replying(vlm, replies):
    critic = open_critic(vlm.runner)
    runner = Replies(vlm.runner, replies)
    object.__setattr__(critic, "runner", runner)
    return critic, runner


def test_hard_mode_keeps_the_critics_own_replies(vlm):
    critic, runner = replying(vlm, ["+", "-", "maybe"])
    found = critic.open(*ASKED).score("one\n\ntwo\n\nthree", "hard")
    assert [step.score for step in found.steps] == [0.0, -100.0, -100.0]
    assert (found.score, [step.reply for step in found.steps]) == (-200.0, ["+", "-", "maybe"])
    start = runner.read[0].removesuffix("one\nassistant\n")
    assert runner.read[1] == f"{start}one\nassistant\n+\nuser\ntwo\nassistant\n"
    assert runner.read[2].endswith("two\nassistant\n-\nuser\nthree\nassistant\n")
    assert (runner.config.max_tokens, runner.config.temperature) == (10, 0)


def test_hard_mode_prepends_a_placeholder_even_where_the_question_has_one(vlm):
    """The published code does: the second one stays in the text, literally."""
    critic, runner = replying(vlm, ["+"])
    critic.open("<image>\nWhich?", [CAT]).score("one", "hard")
    assert "### Question:\n\n<image>\nWhich?\n\n### Solution" in runner.read[0]
    soft = critic.open("<image>\nWhich?", [CAT]).build_inputs(["one"], [])
    assert "<image>" not in vlm.tokenizer.decode(soft.inputs.token_ids)
    ids = [
        critic.open(q, [CAT]).build_inputs(["one"], []).inputs.token_ids
        for q in ("<image>\nQ", "Q")
    ]
    assert ids[0] == ids[1]


def test_a_placeholder_in_a_step_is_text(vlm):
    critic = open_critic(vlm.runner)
    built = critic.open(*ASKED).build_inputs(["the <image> shows", "b"], [critic.reply])
    assert "the <image> shows" in vlm.tokenizer.decode(built.inputs.token_ids)
    assert 0 <= critic.open(*ASKED).score("the <image> shows\n\nb").score <= 1


def test_an_empty_response_loses(critic):
    found = critic.open(*ASKED).score(" \n\n ")
    assert (found.score, found.steps) == (-math.inf, ())


@pytest.mark.parametrize("layout", ["original", "hf_a", "hf_b", "mlx"])
def test_any_layout_can_be_a_critic(layout, vlm):
    found = open_critic(load(str(tiny(Recipe(layout=layout)).folder)).runner)
    system = None if layout in ("original", "mlx") else DEFAULT_SYSTEM
    object.__setattr__(found, "system", system)
    score = found.open(*ASKED).score(RESPONSE).score
    assert score == pytest.approx(
        open_critic(vlm.runner).open(*ASKED).score(RESPONSE).score, abs=1e-3
    )


def system_of(runner, critic):
    built = critic.open(*ASKED).build_inputs(["one"], [])
    text = runner.tokenizer.decode(built.inputs.token_ids)
    return text.removeprefix("system\n").partition("\nuser\n")[0]


def test_the_system_prompt_of_the_config_is_honored(tmp_path):
    folder = shutil.copytree(tiny(Recipe()).folder, tmp_path / "critic")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "system_message": "Judge."}))
    runner = load(str(folder)).runner
    assert system_of(runner, open_critic(runner)) == "Judge."
    assert system_of(runner, open_critic(runner, "Mine.")) == "Mine."
    assert system_of(runner, open_critic(runner, "prm")) == PRM_SYSTEM_PROMPT


def test_without_one_it_is_the_templates(vlm):
    assert system_of(vlm.runner, open_critic(vlm.runner)) == DEFAULT_SYSTEM


def test_a_sign_of_several_tokens_is_refused_by_name(vlm, monkeypatch):
    from internvl3_mlx.test_time_scaling import critic as module

    monkeypatch.setattr(module, "encode_answer", lambda tokenizer, text: [5, 6])
    with pytest.raises(UserError, match=r"its tokenizer writes '\+' as 2 tokens, and a critic's"):
        open_critic(vlm.runner)


def test_an_unknown_mode_is_refused(vlm):
    with pytest.raises(UserError, match="critic mode is 'v2'; choose from soft, hard, orm"):
        open_critic(vlm.runner).open(*ASKED).score("a", "v2")


def test_a_response_beyond_the_context_is_refused():
    short = load(str(tiny(Recipe(max_positions=96)).folder))
    session = open_critic(short.runner, "").open("Which?")
    with pytest.raises(PromptError, match="but the model's context has 96"):
        session.score("the " * 400)
