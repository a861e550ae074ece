"""Rollouts: what is sampled, how steps are judged, and what is written, also after an interrupt."""

import json

import pytest
from click.testing import CliRunner
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx import UserError
from internvl3_mlx.cli import rollouts
from internvl3_mlx.cli.main import main
from internvl3_mlx.errors import DataError
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.prompt_cache import PromptCache
from internvl3_mlx.prompt.reasoning import boxed_question
from internvl3_mlx.test_time_scaling import rollouts as module
from internvl3_mlx.test_time_scaling.correctness import is_correct
from internvl3_mlx.test_time_scaling.rollout_files import (
    Journal,
    critic_rows,
    preference_pairs,
    run_settings,
    write_training_data,
)
from internvl3_mlx.test_time_scaling.rollout_questions import KnownQuestion, read_questions
from internvl3_mlx.test_time_scaling.rollouts import (
    JudgedResponse,
    JudgedStep,
    QuestionRollouts,
    RolloutConfig,
    Sampling,
    choose_judged,
    judge_steps,
    roll_out,
)
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.data.schema import parse_record

CAT = random_image(60, 60)
SAMPLED = GenerationConfig(temperature=1.0, max_tokens=8)
QUESTION = KnownQuestion(2, "How many?", (), ("4",), "q.jsonl:3")


@pytest.mark.parametrize(
    ("response", "answers", "correct"),
    [
        ("Step.\n\nAnswer: \\boxed{4}", ["4"], True),
        ("Final answer: 4.0", ["4"], True),
        ("Answer: 1,200", ["1200"], True),
        ("Answer: 5", ["4"], False),
        ("Four", ["four."], True),
        ("Answer: (B) a cat", ["B"], True),
        ("Answer: b", ["B"], True),
        ("Answer: Bat", ["B"], False),
        ("Answer: 猫", ["狗", "猫"], True),
        ("<think>4</think>", ["4"], False),
        ("", [""], False),
        ("Answer: 50%", ["0.5"], True),
    ],
)
def test_final_answers_are_compared_as_text_numbers_and_letters(response, answers, correct):
    assert is_correct(response, answers) is correct


def test_samples_from_a_response_that_has_begun_continue_it(vlm):
    """Each continuation is what the model samples after a prompt that ends with the beginning."""
    inputs = vlm.runner.build_inputs("What?", [CAT], SAMPLED)
    sampler = Sampling(vlm.runner, inputs, SAMPLED, PromptCache())
    whole = sampler.texts(3, (1, 2))
    seed = module.derived_seed((1, 2))
    alone = [
        vlm.ask("What?", [CAT], temperature=1.0, max_tokens=8, seed=seed + n) for n in range(3)
    ]
    assert whole == [answer.text for answer in alone]
    begun = sampler.texts(2, (3,), "The cat\n\n")
    fresh = Sampling(vlm.runner, inputs, SAMPLED, PromptCache()).texts(2, (3,), "The cat\n\n")
    assert begun == fresh
    assert all(text.startswith("The cat\n\n") for text in begun)
    ids = vlm.tokenizer.encode_text("The cat\n\n")
    extended = module.extended_inputs(inputs, ids)
    assert extended.token_ids[-len(ids) :] == ids
    assert extended.positions.tolist() == [*range(len(extended.token_ids))]


def test_the_images_of_a_question_are_encoded_once(vlm, monkeypatch, tmp_path):
    looked = []
    see = type(vlm.model).get_image_features
    monkeypatch.setattr(
        type(vlm.model),
        "get_image_features",
        lambda self, tiles: looked.append(1) or see(self, tiles),
    )
    CAT.save(tmp_path / "a.png")
    question = KnownQuestion(0, "What?", (str(tmp_path / "a.png"),), ("x",), "q:1")
    monkeypatch.setattr(module, "split_steps", lambda text, limit: [text[:1], text[1:]])
    config = RolloutConfig(samples=3, judged=2, continuations=2, prompt="plain")
    [found] = roll_out(vlm.runner, [question], config, SAMPLED)
    assert looked == [1]
    assert [bool(response.steps) for response in found.responses].count(True) == 2


class Scripted:
    """Samples given texts, and remembers from where."""

    def __init__(self, ends):
        self.ends, self.begun = ends, []

    def texts(self, count, seed, begun=""):
        self.begun.append((begun, count, seed))
        return [begun + end for end in self.ends[begun]][:count]


STEPS = ("Count.\n\n", "Count.\n\nThree and one.\n\n")


@pytest.mark.parametrize(("early_stop", "counts"), [(True, 1), (False, 2)])
def test_a_step_is_as_good_as_the_share_of_correct_ends(early_stop, counts):
    response = JudgedResponse("Count.\n\nThree and one.\n\nAnswer: 5", correct=False)
    sampler = Scripted(
        {
            STEPS[0]: ["Answer: 4", "Answer: 5", "Answer: 4", "Who knows?"],
            STEPS[1]: ["Answer: 5"] * 4,
        }
    )
    config = RolloutConfig(continuations=4, early_stop=early_stop)
    steps = judge_steps(sampler, response, ["4"], config, (0, 7, 1))
    assert [(step.correct, step.total) for step in steps][:2] == [(2, 4), (0, 4)]
    assert steps[2].total == (0 if early_stop else 1)
    assert [step.score for step in steps] == [0.5, 0.0, 0.0]
    assert sampler.begun == [(STEPS[0], 4, (0, 7, 1, 1)), (STEPS[1], 4, (0, 7, 1, 2))]


def test_the_last_step_is_the_response_itself():
    sampler = Scripted({"One.\n\n": ["Answer: 4"] * 3})
    response = JudgedResponse("One.\n\nAnswer: 4", correct=True)
    steps = judge_steps(sampler, response, ["4"], RolloutConfig(continuations=3), (0,))
    assert steps == (JudgedStep("One.", 3, 3), JudgedStep("Answer: 4", 1, 1))


def test_right_and_wrong_responses_are_judged_in_turn():
    told = [("a", True), ("a", True), ("b", True), ("c", False), ("", False), ("d", True)]
    responses = [JudgedResponse(text, correct) for text, correct in told]
    assert choose_judged(responses, 4) == [0, 3, 2, 5]
    assert choose_judged(responses, 0) == []


def rollouts_of(*responses, number=2, images=()):
    question = KnownQuestion(number, "How many?", images, ("4",), "q:1")
    return QuestionRollouts(question, boxed_question("How many?"), responses)


def judged(text, correct, *steps):
    return JudgedResponse(text, correct, tuple(JudgedStep(*step) for step in steps))


ALL_GOOD = judged("A.\n\nAnswer: 4", True, ("A.", 4, 4), ("Answer: 4", 1, 1))
MIXED = judged("B.\n\nAnswer: 5", False, ("B.", 1, 4), ("Answer: 5", 0, 1))
SURE = judged("C.\n\nAnswer: 6", False, ("C.", 3, 4), ("Answer: 6", 0, 0))


def test_critic_rows_have_mixed_labels_first_and_train_a_critic():
    rows = critic_rows([rollouts_of(ALL_GOOD, MIXED), rollouts_of(SURE, images=("/a.png",))])
    assert [row["response"][:1] for row in rows] == ["C", "B", "A"]
    assert rows[0]["image"] == "/a.png"
    assert "image" not in rows[1]
    assert rows[1]["num_mc_sequences"] == 5
    assert rows[0]["steps_with_score"][0] == {
        "step": "C.", "score": 0.75, "num_mc_correct": 3, "num_mc_total": 4,
    }  # fmt: skip
    messages = parse_record(rows[1]).messages
    assert [message.text for message in messages[1::2]] == ["+", "-"]


def test_pairs_are_different_and_certain():
    contained = JudgedResponse("Answer: 4 or 5", correct=False)
    found = rollouts_of(ALL_GOOD, ALL_GOOD, MIXED, contained, JudgedResponse("", correct=False))
    [pair] = preference_pairs(found)
    assert (pair["chosen"], pair["rejected"]) == (ALL_GOOD.text, MIXED.text)
    assert (pair["question"], pair["answer_gt"]) == (boxed_question("How many?"), "4")
    assert parse_record(pair).answers == (ALL_GOOD.text, MIXED.text)


def test_a_question_gives_at_most_fifteen_pairs():
    right = [JudgedResponse(f"{n}.\n\nAnswer: 4", correct=True) for n in range(6)]
    wrong = [JudgedResponse(f"Answer: {n}", correct=False) for n in range(5, 10)]
    pairs = preference_pairs(rollouts_of(*right, *wrong))
    assert len({(pair["chosen"], pair["rejected"]) for pair in pairs}) == len(pairs) == 15
    assert pairs == preference_pairs(rollouts_of(*right, *wrong))


def test_a_killed_run_continues_after_its_last_whole_row(tmp_path):
    questions = [KnownQuestion(n, f"Q{n}?", (), ("4",), f"q:{n}") for n in range(3)]
    told = [QuestionRollouts(question, "told", (ALL_GOOD, MIXED)) for question in questions]
    settings = run_settings(RolloutConfig(), "demo", tmp_path / "q.jsonl", {"temperature": 1.0})
    journal = Journal(tmp_path / "out", settings)
    journal.add(told[0])
    journal.add(told[1])
    journal.close()
    path = tmp_path / "out" / "rollouts.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])  # killed in the middle of a row
    again = Journal(tmp_path / "out", settings)
    assert [*again.rollouts(questions)] == told[:1]
    again.add(told[1])
    assert path.read_bytes() == whole
    again.add(told[2])
    again.close()
    summary = write_training_data(
        tmp_path / "out", [*Journal(tmp_path / "out", settings).rollouts(questions)]
    )
    assert (summary.questions, summary.critic_rows, summary.mixed_rows, summary.pairs) == (
        3,
        6,
        3,
        3,
    )
    with pytest.raises(UserError, match="with temperature 1.0, not 0.5; use the same settings"):
        Journal(tmp_path / "out", {**settings, "temperature": 0.5})
    changed = [KnownQuestion(0, "Other?", (), ("4",), "q:1")]
    with pytest.raises(UserError, match="q:1 has changed since its rollouts were made"):
        [*Journal(tmp_path / "out", settings).rollouts(changed)]
    path.write_text("not a journal\n")
    with pytest.raises(UserError, match="is not a journal of rollouts"):
        Journal(tmp_path / "out", settings)


def write_questions(folder, rows):
    CAT.save(folder / "a.png")
    path = folder / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_questions_are_read_in_the_forms_people_have(tmp_path):
    rows = [
        {"question": "Q?", "answer": 4, "image": "a.png"},
        {"prompt": "Q?", "answers": ["4", "four"], "images": ["a.png", "https://x.org/b.png"]},
        {"query": "Q?", "answer_gt": "4"},
    ]
    found = read_questions(write_questions(tmp_path, rows))
    image = str(tmp_path / "a.png")
    assert [q.answers for q in found] == [("4",), ("4", "four"), ("4",)]
    assert [q.images for q in found] == [(image,), (image, "https://x.org/b.png"), ()]
    assert len(read_questions(tmp_path / "q.jsonl", limit=2)) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Q?"}, r"q.jsonl:1: no 'answer'; expected text, a number or a list"),
        ({"answer": "4"}, "no 'question'; expected text under 'question', 'prompt', 'query'"),
        ({"question": "Q?", "answer": "4", "image": "b.png"}, "no image at .*b.png; check the"),
        ({"question": "Q?", "answer": [True]}, "no 'answer'"),
        ({"question": "Q?", "answer": "4", "image": {"bytes": "aGk="}}, "save it as a file"),
    ],
)
def test_a_question_without_its_parts_is_refused(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read_questions(write_questions(tmp_path, [row]))


def test_an_interrupted_command_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    rows = [{"question": f"What {n}?", "answer": "x", "image": "a.png"} for n in range(3)]
    questions = write_questions(tmp_path, rows)
    model = str(tiny(Recipe()).folder)
    words = ["rollouts", str(questions), "--model", model, "-n", "3", "-m", "5", "--quiet"]

    def run(folder):
        return CliRunner().invoke(main, [*words, "-o", str(tmp_path / folder)])

    assert run("whole").exit_code == 0
    one = module.roll_out_question

    def interrupted(runner, question, *more):
        if question.number == 2:
            raise KeyboardInterrupt
        return one(runner, question, *more)

    monkeypatch.setattr(module, "roll_out_question", interrupted)
    assert run("parts").exit_code == 130
    monkeypatch.setattr(module, "roll_out_question", one)
    assert run("parts").exit_code == 0
    for name in ("rollouts.jsonl", "critic.jsonl", "pairs.jsonl"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert run("parts").exit_code == 0
    TrainConfig(method="prm", data=str(tmp_path / "parts" / "critic.jsonl"))


def test_the_help_shows_the_defaults_of_rollouts():
    shown = {name: float(text) for name, text in rollouts.SHOWN_DEFAULTS.items()}
    assert shown == module.ROLLOUT_DEFAULTS
    text = " ".join(CliRunner().invoke(main, ["rollouts", "--help"]).stdout.split())
    for part in ("greedy decoding. [default: 1]", "0 for all. [default: 50]", "[default: 4096]"):
        assert part in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name the folder for the results: -o FOLDER"),
        (("-o", "x", "--temp", "0"), "at temperature 0 all responses are the same"),
    ],
)
def test_a_command_without_its_parts_is_refused(tmp_path, words, message):
    questions = write_questions(tmp_path, [{"question": "Q?", "answer": "4"}])
    found = CliRunner().invoke(main, ["rollouts", str(questions), *words])
    assert (found.exit_code, message in found.stderr) == (2, True)
